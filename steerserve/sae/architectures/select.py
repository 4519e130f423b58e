"""Which pre-activations a step keeps, found as they are made: above a bound, or the k largest.

On the CPU these are compiled loops that read each part of the [B, F] matrix while it is in the cache and
write only what is kept; torch's own `topk` and `nonzero` read a whole matrix several times and allocate as
much again. On other devices torch does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .entries import DenseEntries, Entries, SparseEntries
from .products import Parts

__all__ = ["above", "batch_top_k", "row_top_k"]

# As many numbers of the first part are looked at for a threshold.
_SAMPLE = 2**18
# How many candidates are looked for, in turn, in units of those that are wanted: tokens differ.
_MARGINS = (1.25, 3.0, float("inf"))

_Part = tuple[slice, Tensor]


def row_top_k(pre: Parts, k: int) -> tuple[SparseEntries, Tensor]:
    """The k largest positive entries of each row (fewer, where fewer are positive).

    Args: pre: [B, F].
    Returns: the places, in row-major order, and their values [n].
    Source: Gao et al. 2024, arXiv:2406.04093, eq. 3.
    """
    (rows, features), k = pre.shape, min(k, pre.shape[1])
    if pre.device.type != "cpu":
        tops = [part.topk(k, dim=-1) for _, part in pre]
        return _flat(torch.cat([t.indices for t in tops]), torch.cat([t.values for t in tops]), pre.shape)
    from . import loops

    columns = np.empty((rows, k), dtype=np.int32)
    values = np.empty((rows, k), dtype=np.float32)
    counts = np.empty(rows, dtype=np.int64)
    for where, part in pre:
        matrix = part.numpy()
        loops.over_rows(
            loops.row_heaps, len(matrix), matrix.size, matrix, columns[where], values[where], counts[where]
        )
    kept = np.arange(k) < counts[:, None]
    return _sparse(counts, columns[kept], features), torch.from_numpy(values[kept])


def batch_top_k(pre: Parts, count: int) -> tuple[SparseEntries, Tensor]:
    """The `count` largest positive entries of a batch (all positive ones, where there are fewer).

    A threshold from a sample leaves few candidates, and the exact selection is made among those: the result
    is that of `pre.flatten().topk(count)`. Ties with the smallest kept entry stay.

    Args: pre: [B, F]; its rows in no order that matters.
    Returns: the places, in row-major order, and their values [n].
    Source: Bussmann et al. 2024, arXiv:2412.06410.
    """
    share = count / (pre.shape[0] * pre.shape[1])
    for margin in _MARGINS:
        parts = iter(pre)
        first = next(parts)
        bound = _sampled_bound(first[1], margin * share)
        entries, values = _gather(chain([first], parts), first[1].new_full(pre.shape[1:], bound))
        if len(values) >= count or bound == 0:
            break
    if len(values) <= count:
        return entries, values
    smallest = torch.kthvalue(values, len(values) - count + 1).values
    kept = values >= smallest
    return entries.subset(kept), values[kept]


def above(pre: Parts, bound: Tensor, room: Callable[[str], Tensor], density: float) -> tuple[Entries, Tensor]:
    """The entries with pre > bound: as a list where few are, as the whole masked matrix where many are.

    Args:
        pre: [B, F]; its rows in no order that matters, for the first part decides between the forms.
        bound: [F], of each feature.
        room: gives the returned entries [B, F] float32 buffers by name, in the second case.
        density: the share of kept entries from which the matrix is the faster form.
    Returns: the places, and the pre-activations there: [n], or [B, F] with zeros elsewhere.
    """
    parts = iter(pre)
    first = next(parts)
    few = int(_row_counts(first[1], bound).sum()) <= density * first[1].numel()
    whole = chain([first], parts)
    return _gather(whole, bound) if few else _masked(whole, bound, room)


def _sampled_bound(part: Tensor, share: float) -> float:
    """A number that about this share of the entries exceeds, not below 0."""
    # A stride without a common factor with the width, so that every column has its turn.
    stride = max(1, part.numel() // _SAMPLE)
    while gcd(stride, part.shape[1]) > 1:
        stride += 1
    sample = part.view(-1)[::stride]
    wanted = share * len(sample) + 32
    return max(0.0, float(sample.topk(int(wanted)).values[-1])) if wanted < len(sample) else 0.0


def _row_counts(part: Tensor, bound: Tensor) -> Any:
    """How many entries of each row lie above, [rows]."""
    if part.device.type != "cpu":
        return (part > bound).sum(1)
    from . import loops

    matrix, counts = part.numpy(), np.empty(len(part), dtype=np.int64)
    loops.over_rows(loops.count, len(matrix), matrix.size, matrix, bound.numpy(), counts)
    return counts


def _gather(parts: Iterable[_Part], bound: Tensor) -> tuple[SparseEntries, Tensor]:
    counts, columns, values = zip(*_gathered(parts, bound), strict=True)
    if bound.device.type != "cpu":
        return _listed(torch.cat(counts), torch.cat(columns), len(bound)), torch.cat(values)
    places = _sparse(np.concatenate(counts), np.concatenate(columns), len(bound))
    return places, torch.from_numpy(np.concatenate(values))


def _gathered(parts: Iterable[_Part], bound: Tensor) -> Iterator[tuple[Any, Any, Any]]:
    """Of each part: how many entries of each row lie above; their columns and values, in row-major order."""
    for _, part in parts:
        counts = _row_counts(part, bound)
        if part.device.type != "cpu":
            rows, features = (part > bound).nonzero(as_tuple=True)
            yield counts, features.int(), part[rows, features]
            continue
        from . import loops

        matrix, starts = part.numpy(), _starts(counts)
        columns, values = np.empty(starts[-1], dtype=np.int32), np.empty(starts[-1], dtype=np.float32)
        loops.over_rows(
            loops.gather, len(matrix), matrix.size, matrix, bound.numpy(), starts, columns, values
        )
        yield counts, columns, values


def _masked(
    parts: Iterable[_Part], bound: Tensor, room: Callable[[str], Tensor]
) -> tuple[DenseEntries, Tensor]:
    out = room("pre")
    kept = torch.empty(out.shape, dtype=torch.bool, device=out.device)
    total = 0
    for rows, part in parts:
        if part.device.type != "cpu":
            torch.gt(part, bound, out=kept[rows])
            torch.mul(part, kept[rows], out=out[rows])
            total += int(kept[rows].sum())
            continue
        from . import loops

        matrix, counts = part.numpy(), np.empty(len(part), dtype=np.int64)
        own = (matrix, bound.numpy(), out[rows].numpy(), kept[rows].numpy(), counts)
        loops.over_rows(loops.keep_above, len(matrix), matrix.size, *own)
        total += int(counts.sum())
    return DenseEntries(kept, room, total), out


def _starts(counts: Any) -> Any:
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def _sparse(counts: Any, columns: Any, features: int) -> SparseEntries:
    starts = torch.from_numpy(_starts(counts).astype(np.int32))
    return SparseEntries(starts, torch.from_numpy(columns), (len(counts), features))


def _listed(counts: Tensor, columns: Tensor, features: int) -> SparseEntries:
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, out=starts[1:])
    return SparseEntries(starts, columns, (len(counts), features))


def _flat(columns: Tensor, values: Tensor, shape: tuple[int, int]) -> tuple[SparseEntries, Tensor]:
    kept = values > 0
    return _listed(kept.sum(1), columns[kept].int(), shape[1]), values[kept]
