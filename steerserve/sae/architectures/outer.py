"""The k largest of many products of two factors, found without computing all of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .entries import SparseEntries
from .products import Parts
from .select import row_top_k

__all__ = ["outer_top_k"]


def outer_top_k(u: Tensor, v: Tensor, shape: tuple[int, int], k: int) -> tuple[SparseEntries, Tensor]:
    """The k largest √(u_i·v_j) of each row, over the pairs of all heads (fewer, where fewer are positive).

    Args: u: [B, h·m]. v: [B, h·n]. shape: (m, n).
    Returns: the places in [B, h·m·n], in row-major order, and the roots [entries].
    """
    (m, n), rows = shape, len(u)
    heads = u.shape[1] // m
    k = min(k, heads * m * n)
    if u.device.type != "cpu":
        products = u.relu().view(rows, heads, m, 1) * v.relu().view(rows, heads, 1, n)
        entries, values = row_top_k(Parts.of(products.view(rows, -1)), k)
        return entries, values.sqrt()
    from . import loops, outer_loop

    columns = np.empty((rows, k), dtype=np.int32)
    values_ = np.empty((rows, k), dtype=np.float32)
    counts = np.empty(rows, dtype=np.int64)
    left, right = (part.contiguous().view(rows, heads, -1).numpy() for part in (u, v))
    size = rows * heads * m * n
    loops.over_rows(outer_loop.outer_heaps, rows, size, left, right, columns, values_, counts)
    starts = np.zeros(rows + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    kept = np.arange(k) < counts[:, None]
    places = SparseEntries(torch.from_numpy(starts), torch.from_numpy(columns[kept]), (rows, heads * m * n))
    return places, torch.from_numpy(np.sqrt(values_[kept]))
