from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from steerserve.errors import ConfigError
from steerserve.sae.architectures import Moment
from steerserve.sae.architectures.switch import Switch, SwitchOptions

from .planting import learn, unit

B, D, F, EXPERTS, K = 128, 16, 96, 8, 4


def _make(**options: float) -> Switch:
    kind = SwitchOptions(**{"k": K, "experts": EXPERTS, **options})
    return Switch.start(F, torch.zeros(D), kind, seed=0)


def _batch(count: int = B) -> Tensor:
    return unit(count, D, seed=1)


def _moment() -> Moment:
    return Moment(torch.zeros(F, dtype=torch.bool))


def test_a_step_encodes_each_token_by_its_own_expert_alone() -> None:
    sae, x = _make(), _batch()
    shares, experts = sae.parameters["router"] @ x.T, F // EXPERTS
    sizes = torch.bincount(shares.argmax(0), minlength=EXPERTS)
    assert int((sizes > 0).sum()) > 3
    with FlopCounterMode(display=False) as counter:
        routed = sae._route(x)
        entries, _ = sae._select(routed)
    router, encoder = 2 * B * D * EXPERTS, 2 * B * D * experts
    assert counter.get_total_flops() == router + encoder
    expert_of = entries.features // experts
    assert torch.equal(expert_of.long(), routed.expert[entries.rows.long()])


def test_the_features_are_the_routed_experts_largest() -> None:
    sae, x = _make(), _batch(20)
    p, size = sae.parameters, F // EXPERTS
    f, reconstruction = sae.autoencode(x)
    for i, token in enumerate(x):
        shares = torch.softmax(p["router"] @ (token - p["router_bias"]), 0)
        e = int(shares.argmax())
        own = slice(e * size, (e + 1) * size)
        pre = (p["encoder"][own] @ (token - p["b_dec"])).relu()
        kept = torch.where(pre >= pre.topk(K).values[-1], pre, 0.0)
        wanted = torch.zeros(F)
        wanted[own] = kept
        torch.testing.assert_close(f[i], wanted)
        decoded = shares[e] * (wanted @ p["decoder"]) + p["b_dec"]
        torch.testing.assert_close(reconstruction[i], decoded)


def test_an_expert_that_gets_everything_is_what_the_balance_charges_most() -> None:
    even, uneven = _make(balance=1.0), _make(balance=1.0)
    even.parameters["router"].zero_()
    uneven.parameters["router"].zero_()[3] = 0
    uneven.parameters["router_bias"].copy_(torch.full((D,), -100.0))
    uneven.parameters["router"][3] = 1.0
    x = _batch()
    costs = [sae.step(x, _moment()) for sae in (even, uneven)]
    balance = [float(cost.loss - cost.squared_error) for cost in costs]
    assert balance[0] == pytest.approx(1, rel=1e-5)
    assert balance[1] == pytest.approx(EXPERTS, rel=1e-5)


def test_experts_that_do_not_divide_the_features_are_refused() -> None:
    with pytest.raises(ConfigError, match="`experts` to divide `d_sae` 96, got 7"):
        Switch.start(F, torch.zeros(D), SwitchOptions(experts=7), seed=0)


def test_activations_alone_are_not_decoded() -> None:
    with pytest.raises(TypeError, match="autoencode"):
        _make().decode(torch.zeros(1, F))


def _planted(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of four kinds, each with its own 12 directions, the first of which it always has; the kind."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(48, 32, generator=generator), dim=-1)
    kind = torch.randint(0, 4, (count,), generator=generator)
    chosen = torch.rand(count, 11, generator=generator).topk(2).indices + 1 + 12 * kind.unsqueeze(1)
    strength = torch.zeros(count, 48)
    strength.scatter_(1, chosen, 1 + torch.rand(count, 2, generator=generator))
    strength[torch.arange(count), 12 * kind] = 1.5
    noise = 0.02 * torch.randn(count, 32, generator=generator)
    return strength @ directions + noise, directions, kind


def test_kinds_of_tokens_go_to_experts_of_their_own_and_their_directions_are_recovered() -> None:
    x, directions, kind = _planted(20_000)
    run = learn(x, architecture="switch", d_sae=96, experts=4, k=3, lr=1e-2, tokens=400_000)
    held = x[-1000:] * run.scale
    f, reconstruction = run.sae.autoencode(held)
    spread = (held - held.mean(0)).square().sum()
    assert 1 - (held - reconstruction).square().sum() / spread > 0.97
    expert = f.view(len(f), 4, -1).sum(-1).argmax(-1)
    table = torch.zeros(4, 4).index_put_((kind[-1000:], expert), torch.ones(1000), accumulate=True)
    assert table.amax(1).sum() > 900
    cosines = directions @ run.sae.parameters["decoder"].T
    assert cosines.amax(1).mean() > 0.85
