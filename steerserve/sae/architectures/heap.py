"""A compiled min-heap of the k largest values and their columns; its root is what most numbers fail."""

from __future__ import annotations

from typing import Any

import numba

__all__ = ["push", "sort"]


@numba.njit(cache=True, nogil=True, boundscheck=False)
def push(heap: Any, where: Any, size: int, value: Any, column: int) -> int:  # pragma: no cover
    """Put a value into a heap, in the place of the smallest where it is full; returns its new size."""
    if size < len(heap):
        at = size
        size += 1
        while at > 0:
            parent = (at - 1) >> 1
            if heap[parent] <= value:
                break
            heap[at], where[at] = heap[parent], where[parent]
            at = parent
    else:
        at = 0
        while True:
            child = 2 * at + 1
            if child >= len(heap):
                break
            if child + 1 < len(heap) and heap[child + 1] < heap[child]:
                child += 1
            if heap[child] >= value:
                break
            heap[at], where[at] = heap[child], where[child]
            at = child
    heap[at], where[at] = value, column
    return size


@numba.njit(cache=True, nogil=True, boundscheck=False)
def sort(heap: Any, where: Any, size: int) -> None:  # pragma: no cover
    """In the order of the columns, in which sparse products read the decoder; the heap is small."""
    for i in range(1, size):
        column, value, at = where[i], heap[i], i
        while at > 0 and where[at - 1] > column:
            where[at], heap[at] = where[at - 1], heap[at - 1]
            at -= 1
        where[at], heap[at] = column, value
