"""Every step's hand-written gradients, held to autograd on the loss in plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.sae.architectures import ARCHITECTURES, Architecture, Moment

B, D, F = 64, 16, 96
CASES: list[tuple[str, dict[str, Any]]] = [
    ("batchtopk", {"k": 6}),
    ("gated", {"l1": 0.3}),
    ("jumprelu", {"penalty": "l0", "sparsity": 0.2, "bandwidth": 0.3}),
    ("jumprelu", {"penalty": "quadratic", "sparsity": 0.2, "l0_target": 8.0, "bandwidth": 0.3}),
    ("jumprelu", {"penalty": "tanh", "sparsity": 0.2, "l0_target": 8.0, "bandwidth": 0.3, "revive": 0.1}),
    ("kron", {"k": 6}),
    ("kron", {"k": 6, "heads": 2, "base": 6, "extension": 8}),
    ("matryoshka", {"k": 6}),
    ("matryoshka", {"k": 6, "widths": [10, 40], "inner": 0.3}),
    ("standard", {"l1": 0.3}),
    ("switch", {"k": 6, "experts": 1, "balance": 0.0}),
    ("switch", {"k": 6, "experts": 8, "balance": 0.5}),
    ("topk", {"k": 6}),
    ("vaease", {}),
]


def make(name: str, options: dict[str, Any]) -> Architecture:
    """Parameters away from their start, where nothing is zero or tied."""
    kind = ARCHITECTURES[name]
    sae = kind.start(F, torch.randn(D, generator=_generator(2)) * 0.1, kind.Options(**options), seed=0)
    generator = _generator(0)
    for tensor in sae.parameters.values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return sae


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _batch() -> Tensor:
    return torch.randn(B, D, generator=_generator(1))


@pytest.mark.parametrize("part", [2**22, 20 * F])
@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("dead_count", [0, 5, 40, F])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_steps_gradients_equal_autograd(
    name: str,
    options: dict[str, Any],
    dead_count: int,
    density: float,
    part: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("steerserve.sae.architectures.products._PART", part)
    for module in ("standard", "jumprelu", "gated"):
        monkeypatch.setattr(f"steerserve.sae.architectures.{module}.DENSITY", density)
    by_hand = make(name, options)
    by_autograd = copy.deepcopy(by_hand)
    moment = Moment(torch.arange(F) < dead_count, warmth=0.7, seed=3)
    for tensor in by_autograd.parameters.values():
        tensor.requires_grad_()
    loss = by_autograd.loss(_batch(), moment)
    loss.backward()
    step = by_hand.step(_batch(), moment)
    assert float(step.loss) == pytest.approx(loss.item(), rel=1e-5)
    for key, tensor in by_hand.parameters.items():
        wanted = by_autograd.parameters[key].grad
        assert tensor.grad is not None
        assert wanted is not None
        assert _relative(tensor.grad, wanted) <= 1e-6, key


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_step_in_bfloat16_comes_near_the_one_in_full_and_is_another(
    name: str, options: dict[str, Any]
) -> None:
    full, half = make(name, options), make(name, options)
    half.precision = torch.bfloat16
    moment = Moment(torch.arange(F) < 5, seed=3)
    wanted, found = full.step(_batch(), moment), half.step(_batch(), moment)
    assert float(found.loss) == pytest.approx(float(wanted.loss), rel=0.02)
    assert any(not torch.equal(half.grad(key), full.grad(key)) for key in full.parameters)
    for key in full.parameters:
        assert half.grad(key).dtype == torch.float32
        assert _relative(half.grad(key), full.grad(key)) <= 0.1, key


def _relative(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))
