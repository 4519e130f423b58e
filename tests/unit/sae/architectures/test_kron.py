from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from steerserve.errors import ConfigError
from steerserve.sae.architectures import Moment
from steerserve.sae.architectures.kron import FLOOR, Kron, KronOptions
from steerserve.sae.architectures.outer import outer_top_k

from .planting import learn, unit

B, D, F, M, N = 64, 16, 96, 4, 8
HEADS = F // (M * N)


def _make(k: int = 6) -> Kron:
    return Kron.start(F, torch.zeros(D), KronOptions(k=k, base=M, extension=N), seed=0)


def _moment(dead: int = 0) -> Moment:
    return Moment(torch.arange(F) < dead)


@pytest.mark.parametrize("k", [1, 6, F, 2 * F])
@pytest.mark.parametrize("shift", [0.0, -0.6, -5.0], ids=["half positive", "few positive", "none positive"])
def test_the_largest_products_are_found_without_all_of_them(k: int, shift: float) -> None:
    u, v = unit(50, HEADS * M, seed=1) * 3 + shift, unit(50, HEADS * N, seed=2) * 3 + shift
    entries, f = outer_top_k(u, v, (M, N), k)
    found = torch.zeros(50, F)
    found[entries.rows.long(), entries.features.long()] = f
    products = u.relu().view(50, HEADS, M, 1) * v.relu().view(50, HEADS, 1, N)
    top = products.view(50, F).topk(min(k, F))
    wanted = torch.zeros(50, F).scatter(1, top.indices, top.values.sqrt())
    torch.testing.assert_close(found, wanted)
    assert (f > 0).all()
    order = entries.rows.long() * F + entries.features
    assert (order.diff() > 0).all()


def test_features_are_roots_of_the_products_of_their_factors() -> None:
    sae, x = _make(k=F), unit(B, D, seed=3)
    p, f = sae.parameters, sae.encode(x)
    for feature in (0, 5, 40, F - 1):
        head, i, j = feature // (M * N), feature // N % M, feature % N
        u = (x - p["b_dec"]) @ p["left"][head * M + i]
        v = (x - p["b_dec"]) @ p["right"][head * N + j]
        wanted = torch.where((u > 0) & (v > 0), (u * v).abs().sqrt(), 0.0)
        torch.testing.assert_close(f[:, feature], wanted)


def test_above_the_floor_gradients_are_those_of_the_plain_root() -> None:
    sae, x = _make(), unit(B, D, seed=3)
    sae.step(x, _moment())
    p = {name: tensor.clone().requires_grad_() for name, tensor in sae.parameters.items()}
    u = ((x - p["b_dec"]) @ p["left"].T + p["left_bias"]).view(B, HEADS, M, 1)
    v = ((x - p["b_dec"]) @ p["right"].T + p["right_bias"]).view(B, HEADS, 1, N)
    both = (u > 0) & (v > 0)
    z = torch.where(both, torch.where(both, u * v, 1.0).sqrt(), 0.0).view(B, F)
    top = z.topk(6)
    f = torch.zeros_like(z).scatter(1, top.indices, top.values)
    # The batch has no kept factor below the floor, which would not be the plain root's.
    kept = f.view(B, HEADS, M, N) > 0
    assert float(torch.where(kept, torch.minimum(u, v), 1.0).detach().min()) > FLOOR
    ((x - f @ p["decoder"] - p["b_dec"]).square().sum() / B).backward()
    for name, tensor in sae.parameters.items():
        wanted = p[name].grad
        assert wanted is not None
        assert tensor.grad is not None
        assert float((tensor.grad - wanted).norm() / wanted.norm()) < 1e-6, name


@pytest.mark.parametrize("tiny", [1e-6, 1e-12, 1e-30])
def test_a_factor_near_zero_has_a_bounded_gradient(tiny: float) -> None:
    sae, x = _make(k=F), unit(B, D, seed=3)
    for name in ("left", "right"):
        sae.parameters[name].zero_()
    sae.parameters["left_bias"].fill_(tiny)
    sae.parameters["right_bias"].fill_(1.0)
    sae.step(x, _moment())
    gradient = sae.parameters["left_bias"].grad
    assert gradient is not None
    # Each factor is in N features, and ½·z/FLOOR of each is at most ½·√(FLOOR)/FLOOR.
    assert 0 <= float(gradient.abs().max()) < N * 0.5 * FLOOR**-0.5


def test_a_step_never_multiplies_by_a_row_per_feature() -> None:
    sae, x = _make(), unit(B, D, seed=3)
    with FlopCounterMode(display=False) as counter:
        sae._factors(x, torch.float32)
    assert counter.get_total_flops() == 2 * B * D * HEADS * (M + N)


@pytest.mark.parametrize("sizes", [{"heads": 4}, {"base": 5}, {"extension": 64}, {"heads": 3, "base": 1}])
def test_sizes_whose_product_is_not_the_number_of_features_are_refused(sizes: dict[str, int]) -> None:
    options = KronOptions(**{"base": M, "extension": N, **sizes})
    with pytest.raises(ConfigError, match="`heads`·`base`·`extension` to be `d_sae` 96"):
        Kron.start(F, torch.zeros(D), options, seed=0)


def test_dead_features_are_revived_through_their_factors() -> None:
    sae, x = _make(), unit(B, D, seed=3)
    alone = sae.step(x, _moment())
    before = {name: tensor.grad.clone() for name, tensor in sae.parameters.items() if tensor.grad is not None}
    revived = sae.step(x, _moment(dead=40))
    assert revived.loss > alone.loss
    for name in ("left", "right", "decoder"):
        gradient = sae.parameters[name].grad
        assert gradient is not None
        assert not torch.equal(gradient, before[name]), name


def _planted(count: int) -> tuple[Tensor, Tensor]:
    """Two of three heads speak in a token: a direction that is the sum of one of four and one of four."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.nn.functional.normalize(torch.randn(3, 4, 32, generator=generator), dim=-1) for _ in range(2)
    )
    directions = torch.nn.functional.normalize(left[:, :, None] + right[:, None], dim=-1).flatten(0, 2)
    heads = torch.rand(count, 3, generator=generator).topk(2).indices
    chosen = heads * 16 + torch.randint(0, 16, (count, 2), generator=generator)
    strength = torch.zeros(count, 48)
    strength.scatter_(1, chosen, 1 + torch.rand(count, 2, generator=generator))
    return strength @ directions + 0.02 * torch.randn(count, 32, generator=generator), directions


def test_directions_made_of_two_factors_are_recovered() -> None:
    x, directions = _planted(20_000)
    run = learn(x, architecture="kron", k=2, lr=1e-2, tokens=200_000)
    cosines = directions @ run.sae.parameters["decoder"].T
    assert cosines.amax(dim=1).mean() > 0.95
    held = x[-1000:] * run.scale
    error = (held - run.sae.autoencode(held)[1]).square().sum()
    assert 1 - error / (held - held.mean(0)).square().sum() > 0.95
