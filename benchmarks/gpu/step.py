"""What a step pays beside the op, once: the token map before it, the count after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from steerserve.steer.triton import DeviceBatch, count_triton, fill_triton
from steerserve.tally import Tallies
from steerserve.tokens import Batch
from steerserve.window import Window, resolve

from .kernel import BATCHES, ROWS
from .plans import random_plans
from .timing import microseconds_of_each

__all__ = ["bookkeeping"]

_MAX_TOKENS = 8192
_VOCAB = 128_256
_PROMPT = 1024
_LAUNCHES = 20


def bookkeeping() -> Iterator[dict[str, Any]]:
    """Microseconds of `fill_triton` and `count_triton` on decode steps and on one long prompt."""
    for batch in BATCHES:
        yield _measured("decode", batch, 1)
    yield _measured("prefill", 1, _MAX_TOKENS)


def _measured(phase: str, requests: int, each: int) -> dict[str, Any]:
    fill, count = _calls(requests, each)
    return {
        "phase": phase,
        "requests": requests,
        "tokens": requests * each,
        "map_microseconds": round(microseconds_of_each([fill] * _LAUNCHES), 3),
        "count_microseconds": round(microseconds_of_each([count] * _LAUNCHES), 3),
    }


def _calls(requests: int, each: int) -> tuple[Callable[[], None], Callable[[], None]]:
    def full(value: int, dtype: torch.dtype, size: int = _MAX_TOKENS) -> torch.Tensor:
        return torch.full((size,), value, dtype=dtype, device="cuda")

    tallies = Tallies(requests, "cuda")
    selector = resolve([Window()] * ROWS, _PROMPT)
    numbers = list(range(requests))
    layout = DeviceBatch.of(Batch.of(numbers, [selector] * requests), numbers, "cuda")
    starts = torch.arange(requests + 1, dtype=torch.int32, device="cuda") * each
    positions = full(_PROMPT, torch.int64) + torch.arange(_MAX_TOKENS, device="cuda") % each
    special = full(0, torch.bool, _VOCAB)
    of_token = (full(-1, torch.int32), full(0, torch.int64), full(-1, torch.int32), full(0, torch.int64))
    slot, _, table, position = of_token
    fill = partial(
        fill_triton, layout, starts, positions, full(7, torch.int32), special, *of_token, tallies.since
    )
    limit = full(_PROMPT + each, torch.int64, requests)
    trace = torch.rand(_MAX_TOKENS, ROWS, 2, device="cuda")
    plans = random_plans(requests, ROWS, 16, "cuda")
    counted = (slot, table, position, tallies.settled, limit, plans, trace)
    count = partial(count_triton, tallies.table, tallies.recent, *counted)
    return fill, count
