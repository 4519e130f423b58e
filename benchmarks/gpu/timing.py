"""Time on the GPU itself: recorded CUDA graphs between events, so that no launch from Python is measured."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch

__all__ = ["copy_bandwidth", "microseconds_of_each", "milliseconds", "recorded"]

_COPIED_BYTES = 4 * 2**30
_REPEATS = 30


def recorded(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What `call` launches, as one graph; it has run before, so that everything is compiled."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def milliseconds(call: Callable[[], object], times: int) -> float:
    """GPU time of one of `times` calls in a row."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / times


def microseconds_of_each(launches: list[Callable[[], object]]) -> float:
    """Median GPU time of one launch, from replays of a graph that holds all of them.

    Args: launches: the same work on different data, more of it than the L2 cache holds.
    """

    def everything() -> None:
        for launch in launches:
            launch()

    graph = recorded(everything)
    graph.replay()
    return median(milliseconds(graph.replay, 1) for _ in range(_REPEATS)) / len(launches) * 1e3


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy much larger than any cache."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    spent = median(milliseconds(lambda: target.copy_(source), 1) for _ in range(_REPEATS))
    return 2 * _COPIED_BYTES / spent * 1e3
