from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from steerserve.sae.architectures.entries import DenseEntries, Entries, SparseEntries
from steerserve.sae.architectures.products import Parts
from steerserve.sae.architectures.select import above, batch_top_k, row_top_k


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _rooms(rows: int, width: int) -> Callable[[str], Tensor]:
    return cache(lambda _: torch.empty(rows, width))


def _whole(entries: Entries, values: Tensor, width: int) -> Tensor:
    """The [B, F] matrix: decoding by the identity."""
    return entries.decode(values, torch.eye(width))


def _in_parts(matrix: Tensor, size: int) -> Parts:
    rows, width = matrix.shape
    places = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    return Parts((rows, width), matrix.device, lambda: ((place, matrix[place]) for place in places))


@pytest.mark.parametrize("size", [7, 64, 500])
@pytest.mark.parametrize("count", [1, 60, 640, 6000])
@pytest.mark.parametrize("shape", [(64, 96), (500, 300)])
def test_batch_selection_equals_a_flat_top_k(shape: tuple[int, int], count: int, size: int) -> None:
    pre = _numbers(*shape)
    top = pre.flatten().topk(count)
    wanted = torch.zeros_like(pre).view(-1).scatter(0, top.indices, top.values).view(shape).relu()
    entries, values = batch_top_k(_in_parts(pre, size), count)
    assert torch.equal(_whole(entries, values, shape[1]), wanted)


def test_a_first_part_unlike_the_others_misleads_no_selection() -> None:
    pre = _numbers(400, 50)
    pre[:10] += 5.0
    top = pre.flatten().topk(900)
    entries, values = batch_top_k(_in_parts(pre, 10), 900)
    assert torch.equal(values.sort().values, top.values.flip(0))
    assert entries.size == 900


@pytest.mark.parametrize("size", [7, 200])
@pytest.mark.parametrize("k", [1, 5, 32, 96])
def test_row_selection_equals_torch_topk(k: int, size: int) -> None:
    pre = _numbers(200, 96)
    top = pre.topk(k, dim=-1)
    wanted = torch.zeros_like(pre).scatter(1, top.indices, top.values).relu()
    entries, values = row_top_k(_in_parts(pre, size), k)
    assert torch.equal(_whole(entries, values, 96), wanted)
    assert isinstance(entries, SparseEntries)
    for start, stop in zip(entries.starts[:-1], entries.starts[1:], strict=True):
        assert entries.features[start:stop].diff().gt(0).all()


def test_row_selection_of_equal_numbers_keeps_exactly_k() -> None:
    entries, values = row_top_k(Parts.of(torch.ones(3, 20)), 4)
    assert len(values) == 12
    assert torch.equal(entries.count(values > 0).sum(), torch.tensor(12))


def test_a_nan_is_never_selected_as_if_it_were_large() -> None:
    pre = _numbers(4, 30)
    pre[1, 3] = torch.nan
    assert torch.isfinite(row_top_k(Parts.of(pre), 30)[1]).all()


def test_selection_survives_a_sample_that_sees_nothing() -> None:
    pre = torch.full((61, 61), -1.0)
    pre.view(-1)[1:100:2] = torch.arange(50) + 1.0
    _, values = batch_top_k(Parts.of(pre), 20)
    assert sorted(values.tolist()) == [31.0 + i for i in range(20)]


def test_selection_keeps_only_positive_entries() -> None:
    assert len(batch_top_k(Parts.of(torch.full((4, 5), -1.0)), 10)[1]) == 0
    assert len(row_top_k(Parts.of(torch.full((4, 5), -1.0)), 3)[1]) == 0


@pytest.mark.parametrize("size", [9, 40])
@pytest.mark.parametrize(("density", "kind"), [(1.0, SparseEntries), (0.0, DenseEntries)])
def test_both_forms_of_entries_answer_alike(density: float, kind: type[Entries], size: int) -> None:
    rows, width, d = 40, 30, 8
    pre, bound = _numbers(rows, width), _numbers(width).abs() / 2
    wanted = torch.where(pre > bound, pre, 0.0)
    toward, decoder, inputs = _numbers(rows, d), _numbers(width, d), _numbers(rows, d)
    entries, values = above(_in_parts(pre, size), bound, _rooms(rows, width), density)
    assert isinstance(entries, kind)
    torch.testing.assert_close(entries.decode(values, decoder), wanted @ decoder)
    torch.testing.assert_close(
        entries.weigh(values, inputs, torch.full((width, d), torch.nan)), wanted.T @ inputs
    )
    torch.testing.assert_close(entries.sums(values), wanted.sum(0))
    assert torch.equal(entries.count(values > 0), (wanted > 0).sum(0))
    raised = entries.correlate(toward, decoder, plus=bound, into="other")
    lifted = (toward @ decoder.T + bound) * (wanted != 0)
    torch.testing.assert_close(_whole(entries, raised, width), lifted)
    half = entries.only(raised, raised > 0)
    torch.testing.assert_close(_whole(entries, half, width), lifted.relu())
    correlated = entries.correlate(toward, decoder)
    expected = (toward @ decoder.T) * (wanted != 0)
    torch.testing.assert_close(_whole(entries, correlated, width), expected)
    scaled = entries.mask(entries.at(bound) * (values != 0))
    torch.testing.assert_close(_whole(entries, scaled, width), bound * (wanted != 0))


def test_a_range_of_columns_is_a_matrix_of_its_own() -> None:
    pre = _numbers(20, 30)
    entries, values = above(Parts.of(pre), torch.zeros(30), _rooms(20, 30), 1.0)
    assert isinstance(entries, SparseEntries)
    which, part = entries.columns(10, 25)
    assert torch.equal(_whole(part, values[which], 15), pre.relu()[:, 10:25])
