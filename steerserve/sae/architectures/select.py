"""Which pre-activations a step keeps, found in one or two passes over them: above a bound, or the k largest.

On the CPU these are compiled loops that read the [B, F] matrix once and write only what is kept; torch's own
`topk` and `nonzero` read it several times and allocate as much again. On other devices torch does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .entries import DenseEntries, Entries, SparseEntries

__all__ = ["above", "batch_top_k", "row_top_k"]

# Every 61st number is looked at for a first threshold; a prime, so that no column is looked at alone.
_STRIDE = 61


def row_top_k(pre: Tensor, k: int) -> tuple[Entries, Tensor]:
    """The k largest positive entries of each row (fewer, where fewer are positive).

    Args: pre: [B, F] float32, contiguous.
    Returns: the places, in row-major order, and their values [n].
    Source: Gao et al. 2024, arXiv:2406.04093, eq. 3.
    """
    k = min(k, pre.shape[1])
    if pre.device.type != "cpu":
        top = pre.topk(k, dim=-1)
        return _flat(top.indices, top.values, pre.shape)
    from . import loops

    columns = np.empty((pre.shape[0], k), dtype=np.int32)
    values = np.empty((pre.shape[0], k), dtype=np.float32)
    counts = np.empty(pre.shape[0], dtype=np.int64)
    loops.over_rows(loops.row_heaps, len(pre), pre.numel(), pre.numpy(), columns, values, counts)
    starts = np.zeros(pre.shape[0] + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    kept = np.arange(k) < counts[:, None]
    return _sparse(starts, columns[kept], pre.shape), torch.from_numpy(values[kept])


def batch_top_k(pre: Tensor, count: int) -> tuple[Entries, Tensor]:
    """The `count` largest positive entries of a batch (all positive ones, where there are fewer).

    A threshold from a sample leaves few candidates, and the exact selection is made among those: the result
    is that of `pre.flatten().topk(count)`. Ties with the smallest kept entry stay.

    Args: pre: [B, F] float32, contiguous.
    Returns: the places, in row-major order, and their values [n].
    Source: Bussmann et al. 2024, arXiv:2412.06410.
    """
    bound = _sampled_bound(pre.view(-1), count)
    entries, values = _sparse_above(pre, pre.new_full((pre.shape[1],), bound))
    if len(values) < count and bound > 0:
        # The sample misjudged the tail: every positive entry is a candidate.
        entries, values = _sparse_above(pre, pre.new_zeros(pre.shape[1]))
    if len(values) <= count:
        return entries, values
    smallest = torch.kthvalue(values, len(values) - count + 1).values
    kept = values >= smallest
    return entries.subset(kept), values[kept]


def above(
    pre: Tensor, bound: Tensor, room: Callable[[str], Tensor], density: float
) -> tuple[Entries, Tensor]:
    """The entries with pre > bound: as a list where few are, as the whole masked matrix where many are.

    Args:
        pre: [B, F] float32, contiguous; in the second case overwritten by the returned values.
        bound: [F], of each feature.
        room: gives the returned entries [B, F] float32 buffers by name, in the second case.
        density: the share of kept entries from which the matrix is the faster form.
    Returns: the places, and the pre-activations there: [n], or [B, F] with zeros elsewhere.
    """
    size = _count_above(pre, bound)
    if size <= density * pre.numel():
        return _sparse_above(pre, bound)
    return DenseEntries(_keep_above(pre, bound), room, size), pre


def _sampled_bound(flat: Tensor, count: int) -> float:
    sample = flat[::_STRIDE]
    wanted = int(1.1 * count / _STRIDE) + 32
    return max(0.0, float(sample.topk(wanted).values[-1])) if wanted < len(sample) else 0.0


def _count_above(pre: Tensor, bound: Tensor) -> int:
    if pre.device.type != "cpu":
        return int((pre > bound).sum())
    from . import loops

    counts = np.empty(pre.shape[0], dtype=np.int64)
    loops.over_rows(loops.count, len(pre), pre.numel(), pre.numpy(), bound.numpy(), counts)
    return int(counts.sum())


def _keep_above(pre: Tensor, bound: Tensor) -> Tensor:
    """[B, F] bool, which entries lie above; the others become zero."""
    if pre.device.type != "cpu":
        kept = pre > bound
        pre.mul_(kept)
        return kept
    from . import loops

    kept = torch.empty(pre.shape, dtype=torch.bool)
    loops.over_rows(loops.keep_above, len(pre), pre.numel(), pre.numpy(), bound.numpy(), kept.numpy())
    return kept


def _sparse_above(pre: Tensor, bound: Tensor) -> tuple[SparseEntries, Tensor]:
    if pre.device.type != "cpu":
        rows, features = (pre > bound).nonzero(as_tuple=True)
        starts = torch.zeros(pre.shape[0] + 1, dtype=torch.int32, device=pre.device)
        torch.cumsum(torch.bincount(rows, minlength=pre.shape[0]), 0, out=starts[1:])
        return SparseEntries(starts, features.int(), (pre.shape[0], pre.shape[1])), pre[rows, features]
    from . import loops

    matrix, limits = pre.numpy(), bound.numpy()
    counts = np.empty(pre.shape[0], dtype=np.int64)
    loops.over_rows(loops.count, len(pre), pre.numel(), matrix, limits, counts)
    starts_ = np.zeros(pre.shape[0] + 1, dtype=np.int64)
    np.cumsum(counts, out=starts_[1:])
    columns, values = np.empty(starts_[-1], dtype=np.int32), np.empty(starts_[-1], dtype=np.float32)
    loops.over_rows(loops.gather, len(pre), pre.numel(), matrix, limits, starts_, columns, values)
    return _sparse(starts_, columns, pre.shape), torch.from_numpy(values)


def _sparse(starts: Any, columns: Any, shape: torch.Size) -> SparseEntries:
    return SparseEntries(
        torch.from_numpy(starts.astype(np.int32)), torch.from_numpy(columns), (shape[0], shape[1])
    )


def _flat(features: Tensor, values: Tensor, shape: torch.Size) -> tuple[SparseEntries, Tensor]:
    kept = values > 0
    starts = torch.zeros(shape[0] + 1, dtype=torch.int32, device=values.device)
    torch.cumsum(kept.sum(1), 0, out=starts[1:])
    return SparseEntries(starts, features[kept].int(), (shape[0], shape[1])), values[kept]
