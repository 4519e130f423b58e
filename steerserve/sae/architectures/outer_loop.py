"""The compiled loop of `outer_top_k`; imported when it is first needed."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .heap import push, sort

__all__ = ["outer_heaps"]


@numba.njit(cache=True, nogil=True, boundscheck=False)
def outer_heaps(
    start: int, stop: int, left: Any, right: Any, columns: Any, values: Any, counts: Any
) -> None:  # pragma: no cover - compiled
    """For each row, a heap of the largest products so far; its root is the bound.

    A head, or a row of it, whose largest product is not above the bound is left out.
    """
    heads, m, n, k = left.shape[1], left.shape[2], right.shape[2], columns.shape[1]
    for row in range(start, stop):
        heap, where = values[row], columns[row]
        size, bound = 0, np.float32(0.0)
        for h in range(heads):
            u, v = left[row, h], right[row, h]
            u_most, v_most = u[0], v[0]
            for i in range(1, m):
                u_most = max(u_most, u[i])
            for j in range(1, n):
                v_most = max(v_most, v[j])
            if u_most <= 0.0 or v_most <= 0.0 or not u_most * v_most > bound:
                continue
            for i in range(m):
                if u[i] <= 0.0 or not u[i] * v_most > bound:
                    continue
                for j in range(n):
                    product = u[i] * v[j]
                    if v[j] > 0.0 and product > bound:
                        size = push(heap, where, size, product, (h * m + i) * n + j)
                        if size == k:
                            bound = heap[0]
        counts[row] = size
        sort(heap, where, size)
