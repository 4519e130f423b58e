"""The products of a step, held to float64: by oneDNN, and by torch's BLAS where that is all there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steerserve.sae.architectures import products
from steerserve.sae.architectures.products import linear, mixed, weighed

B, D, F = 50, 24, 36


@pytest.fixture(params=[True, False] if products._onednn() else [False], ids=str, autouse=True)
def by_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn", lambda: request.param)


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", [2**22, 16 * F, 1])
def test_a_product_in_parts_is_the_product(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_PART", part)
    x, weight, bias = _numbers(B, D), _numbers(F, D), _numbers(F)
    wanted = x.double() @ weight.double().T
    _close(linear(x, weight).into(torch.full((B, F), torch.nan)), wanted)
    _close(linear(x, weight, bias).into(torch.full((B, F), torch.nan)), wanted + bias)


def test_parts_can_be_gone_through_again() -> None:
    parts = linear(_numbers(B, D), _numbers(F, D))
    first, second = (torch.cat([part for _, part in parts]) for _ in range(2))
    assert torch.equal(first, second)


def test_lower_precision_rounds_the_factors_and_adds_the_bias_in_full() -> None:
    x, weight, bias = _numbers(B, D), _numbers(F, D), _numbers(F) + 256
    found = linear(x, weight, bias, torch.bfloat16).into(torch.empty(B, F))
    rounded = x.bfloat16().double() @ weight.bfloat16().double().T
    torch.testing.assert_close(found.double() - bias, rounded, rtol=2**-7, atol=1e-3)


def test_lines_of_values_mix_rows() -> None:
    values, rows = _numbers(B, F), _numbers(F, D)
    _close(mixed(values, rows), values.double() @ rows.double())


def test_inputs_are_weighed_into_the_room_that_is_given() -> None:
    values, inputs, room = _numbers(B, F), _numbers(B, D), torch.full((F, D), torch.nan)
    assert weighed(values, inputs, room) is room
    _close(room, values.double().T @ inputs.double())
