from __future__ import annotations

import copy

import torch
from torch import Tensor

from steerserve.sae.architectures import Moment
from steerserve.sae.architectures.vaease import VaEase, VaEaseOptions

from .planting import learn, unit

B, D, F = 64, 16, 96


def _make() -> VaEase:
    sae = VaEase.start(F, torch.zeros(D), VaEaseOptions(), seed=0)
    generator = torch.Generator().manual_seed(0)
    for tensor in sae.parameters.values():
        tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return sae


def _moment(seed: int = 0) -> Moment:
    return Moment(torch.zeros(F, dtype=torch.bool), seed=seed)


def test_inference_is_the_gated_mean_where_sigma_is_below_one_half() -> None:
    sae, x = _make(), unit(B, D, seed=1)
    p = sae.parameters
    centred = x - p["b_dec"]
    mean = centred @ p["encoder"].T + p["bias"]
    sigma = 1 / (1 + torch.exp(centred @ p["gate"].T + p["gate_bias"]))
    wanted = (1 - sigma) * mean * (sigma < 0.5)
    f, reconstruction = sae.autoencode(x)
    assert 0 < int((f != 0).sum()) < f.numel()
    # Activations are given for decoder rows of norm one.
    torch.testing.assert_close(f, wanted * p["decoder"].norm(dim=1))
    torch.testing.assert_close(reconstruction, wanted @ p["decoder"] + p["b_dec"])


def test_a_step_counts_as_active_what_inference_does() -> None:
    sae, x = _make(), unit(B, D, seed=1)
    step, f = sae.step(x, _moment()), sae.encode(x)
    assert float(step.l0) == float((f != 0).sum()) / B
    assert torch.equal(step.fired, (f != 0).any(0))


def test_the_noise_is_of_the_steps_seed_alone() -> None:
    sae, x = _make(), unit(B, D, seed=1)
    torch.manual_seed(5)
    first = copy.deepcopy(sae.step(x, _moment(3)))
    torch.manual_seed(6)
    assert torch.equal(sae.step(x, _moment(3)).loss, first.loss)
    assert not torch.equal(sae.step(x, _moment(4)).loss, first.loss)


def test_with_the_noise_off_and_the_gates_open_the_loss_is_the_error_over_gamma() -> None:
    sae, x = _make(), unit(B, D, seed=1)
    sae.parameters["gate"].zero_()
    sae.parameters["gate_bias"].fill_(60.0)
    moment = Moment(_moment().dead, warmth=0.0)
    step = sae.step(x, moment)
    log_gamma = 10 * sae.parameters["log_gamma"][0]
    mean = (x - sae.parameters["b_dec"]) @ sae.parameters["encoder"].T + sae.parameters["bias"]
    error = (x - mean @ sae.parameters["decoder"] - sae.parameters["b_dec"]).square().sum() / B
    torch.testing.assert_close(step.loss, error / log_gamma.exp() + D * log_gamma)


def _planted(count: int) -> tuple[Tensor, Tensor]:
    """Sums of three of 48 unit directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(48, 32, generator=generator), dim=-1)
    strength = torch.zeros(count, 48)
    chosen = torch.rand(count, 48, generator=generator).topk(3).indices
    strength.scatter_(1, chosen, 1 + torch.rand(count, 3, generator=generator))
    return strength @ directions + 0.02 * torch.randn(count, 32, generator=generator), directions


def test_directions_and_their_number_in_each_token_are_recovered() -> None:
    x, directions = _planted(20_000)
    run = learn(x, architecture="vaease", lr=1e-2, tokens=500_000)
    decoder = torch.nn.functional.normalize(run.sae.parameters["decoder"], dim=-1)
    assert (directions @ decoder.T).amax(1).mean() > 0.95
    held = x[-1000:] * run.scale
    f, reconstruction = run.sae.autoencode(held)
    # Nobody said how many; γ found it.
    assert 2.5 < float((f != 0).sum()) / len(f) < 3.5
    assert float((f < 0).sum()) <= 0.01 * float((f != 0).sum())
    error = (held - reconstruction).square().sum()
    assert 1 - error / (held - held.mean(0)).square().sum() > 0.85
    # γ is the variance of the error that remains in each dimension.
    gamma = float((10 * run.sae.parameters["log_gamma"][0]).exp())
    assert gamma < 0.1 / 32
