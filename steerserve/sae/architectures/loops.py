"""The compiled loops of a training step on the CPU: what is kept, and the same seen from the features.

Imported when the first step is made, for numba takes its time. The loops release the interpreter and are run
by plain threads: numba's own parallel loops leave threads of the OpenMP runtime spinning, on cores that torch
waits for (measured on a busy machine: steps 33 times as long).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch

from .heap import push, sort

__all__ = [
    "column_counts",
    "copy_only",
    "count",
    "gather",
    "keep_above",
    "only",
    "over_rows",
    "row_heaps",
    "transpose",
]

# Numbers to look at from which a second thread is worth waking.
_WORTH_SHARING = 2**20


def over_rows(loop: Callable[..., None], rows: int, size: int, *arrays: Any) -> None:
    """Run `loop(start, stop, *arrays)` over ranges of rows, on as many threads as torch may use.

    Args: rows: B. size: how many numbers the loop looks at in all.
    """
    threads = torch.get_num_threads() if size >= _WORTH_SHARING else 1
    if threads == 1:
        loop(0, rows, *arrays)
        return
    bounds = [rows * part // threads for part in range(threads + 1)]
    running = [
        _pool(threads).submit(loop, bounds[part], bounds[part + 1], *arrays) for part in range(1, threads)
    ]
    loop(bounds[0], bounds[1], *arrays)
    for part in running:
        part.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="steerserve-loops")


@numba.njit(cache=True, nogil=True, boundscheck=False)
def count(start: int, stop: int, pre: Any, bound: Any, counts: Any) -> None:  # pragma: no cover - compiled
    """How many numbers of each row of `pre` [B, F] lie above `bound` [F]; into `counts` [B]."""
    for row in range(start, stop):
        line, n = pre[row], 0
        for j in range(len(line)):
            n += line[j] > bound[j]
        counts[row] = n


@numba.njit(cache=True, nogil=True, boundscheck=False)
def gather(
    start: int, stop: int, pre: Any, bound: Any, starts: Any, columns: Any, values: Any
) -> None:  # pragma: no cover - compiled
    """Those numbers and their columns; row i writes from `starts[i]` on."""
    for row in range(start, stop):
        line, at = pre[row], starts[row]
        for j in range(len(line)):
            if line[j] > bound[j]:
                columns[at], values[at] = j, line[j]
                at += 1


@numba.njit(cache=True, nogil=True, boundscheck=False)
def keep_above(
    start: int, stop: int, pre: Any, bound: Any, out: Any, kept: Any, counts: Any
) -> None:  # pragma: no cover - compiled
    """Into `kept` [B, F] bool, which numbers of `pre` lie above `bound` [F]; into `out`, those, or zero.

    Into `counts` [B], how many of each row.
    """
    for row in range(start, stop):
        line, copy, holds, n = pre[row], out[row], kept[row], 0
        for j in range(len(line)):
            above = line[j] > bound[j]
            holds[j] = above
            copy[j] = line[j] if above else np.float32(0.0)
            n += above
        counts[row] = n


@numba.njit(cache=True, nogil=True, boundscheck=False)
def only(start: int, stop: int, values: Any, which: Any) -> None:  # pragma: no cover - compiled
    """Zero the values [B, F] where `which` bool does not hold."""
    for row in range(start, stop):
        line, holds = values[row], which[row]
        for j in range(len(line)):
            line[j] = line[j] if holds[j] else np.float32(0.0)


@numba.njit(cache=True, nogil=True, boundscheck=False)
def copy_only(
    start: int, stop: int, values: Any, which: Any, out: Any
) -> None:  # pragma: no cover - compiled
    """The same into `out`, which is other memory: were it the same, no vector instruction could be used."""
    for row in range(start, stop):
        line, holds, copy = values[row], which[row], out[row]
        for j in range(len(line)):
            copy[j] = line[j] if holds[j] else np.float32(0.0)


@numba.njit(cache=True, nogil=True, boundscheck=False)
def column_counts(which: Any, counts: Any) -> None:  # pragma: no cover - compiled
    """Add to `counts` [F] in how many rows `which` [B, F] bool holds."""
    for row in range(which.shape[0]):
        holds = which[row]
        for j in range(len(holds)):
            counts[j] += holds[j]


@numba.njit(cache=True, nogil=True, boundscheck=False)
def row_heaps(
    start: int, stop: int, pre: Any, columns: Any, values: Any, counts: Any
) -> None:  # pragma: no cover - compiled
    """The largest positive numbers of each row, as many as `columns` and `values` [B, k] hold."""
    for row in range(start, stop):
        line, heap, where = pre[row], values[row], columns[row]
        size, bound = 0, np.float32(0.0)
        for j in range(len(line)):
            if line[j] > bound:
                size = push(heap, where, size, line[j], j)
                if size == len(heap):
                    bound = heap[0]
        counts[row] = size
        sort(heap, where, size)


@numba.njit(cache=True, nogil=True, boundscheck=False)
def transpose(starts: Any, features: Any, places: Any, order: Any, rows: Any) -> None:  # pragma: no cover
    """A counting sort; `places` [F + 1] says where each feature's entries begin, and is used up."""
    for row in range(len(starts) - 1):
        for i in range(starts[row], starts[row + 1]):
            at = places[features[i]]
            places[features[i]] = at + 1
            order[at], rows[at] = i, row
