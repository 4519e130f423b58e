"""The kernel alone: held to the reference on this GPU, then timed against what its bytes cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steerserve.steer import History
from steerserve.steer.buffers import PointBuffers
from steerserve.steer.reference import steer_reference
from steerserve.steer.triton import steer_triton

from .floor import least_bytes, least_microseconds
from .plans import copied, random_plans, vary
from .timing import microseconds_of_each

__all__ = ["BATCHES", "CHECKS", "ROWS", "check", "cost"]

BATCHES = (1, 16, 64, 256)
ROWS = 8
WIDTH = 4096
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Width, rows, and whether x comes in two parts: every other one, because each is compiled in three dtypes.
CHECKS = [
    (width, rows, (i + j) % 2 == 0)
    for i, width in enumerate((128, 256, 896, 4096, 8192))
    for j, rows in enumerate((1, 8, 20, 64))
]
# A replay goes through 128 MiB of slots or more (256 KiB each), which no L2 cache holds: in a model, too,
# a layer's rows come from memory.
_SLOTS = 2048
_MOST_LAUNCHES = 512


def check(width: int, rows: int, two_parts: bool, device: str = "cuda") -> Iterator[dict[str, Any]]:
    """The kernel against the reference, in each dtype.

    Returns: the largest error, relative where the value exceeds 1; `ok` also asks that the traces agree and
    that unsteered tokens are untouched.
    """
    plans = random_plans(5, rows, width, "cpu")
    vary(plans)
    there = copied(plans, device)
    slot = torch.tensor([0, 1, -1, 2, 3, 4, 0, -1], dtype=torch.int32)
    mask = torch.randint(-(2**63), 2**63 - 1, (len(slot),), generator=torch.Generator().manual_seed(1))
    for dtype, tolerance in TOLERANCE.items():
        stream = torch.randn(len(slot), width, generator=torch.Generator().manual_seed(2)).to(dtype)
        addend = torch.randn(len(slot), width, generator=torch.Generator().manual_seed(3)).to(dtype)
        other = addend if two_parts else None
        expected, expected_trace = stream.clone(), torch.empty(len(slot), rows, 2)
        steer_reference(expected, other, plans, slot, mask, expected_trace)
        got, trace = stream.to(device, copy=True), torch.full((len(slot), rows, 2), torch.nan, device=device)
        notes = History.blank(len(slot), device)
        added = None if other is None else other.to(device)
        steer_triton(got, added, there, slot.to(device), mask.to(device), trace, notes)
        error = _error(got.cpu(), expected)
        same = torch.allclose(trace.cpu(), expected_trace, rtol=1e-4, atol=1e-4, equal_nan=True)
        untouched = torch.equal(got.cpu()[slot < 0], stream[slot < 0])
        yield {
            "dtype": str(dtype).removeprefix("torch."),
            "width": width,
            "rows": rows,
            "two_parts": two_parts,
            "error": error,
            "tolerance": tolerance,
            "ok": error <= tolerance and same and untouched,
        }


def _error(got: Tensor, expected: Tensor) -> float:
    wanted = expected.float()
    return float(((got.float() - wanted).abs() / wanted.abs().clamp(min=1.0)).max())


def cost(bytes_per_second: float) -> Iterator[dict[str, Any]]:
    """Microseconds of a launch on a decode step's tokens, and the least that memory allows.

    Args: bytes_per_second: of a large copy on this GPU.
    """
    plans = random_plans(_SLOTS, ROWS, WIDTH, "cuda")
    for batch in BATCHES:
        for kind, distinct in (("idle", 0), ("one plan", 1), ("plans", batch)):
            spent = microseconds_of_each(list(_launches(plans, batch, distinct)))
            moved = least_bytes(
                plans=distinct, rows=ROWS, width=WIDTH, tokens=batch if distinct else 0, itemsize=2
            )
            floor = least_microseconds(moved, bytes_per_second)
            yield {
                "batch": batch,
                "kind": kind,
                "microseconds": round(spent, 3),
                "bytes": moved,
                "floor_microseconds": round(floor, 3),
                "times_floor": round(spent / floor, 3) if floor else None,
            }


def _launches(plans: PointBuffers, batch: int, distinct: int) -> Iterator[Callable[[], None]]:
    """Launches on tokens and slots of their own, as many as the slots allow."""
    count = min(_MOST_LAUNCHES, _SLOTS // max(1, distinct))
    streams = torch.randn(count, 2, batch, WIDTH, device="cuda").to(torch.bfloat16)
    trace = torch.empty(batch, ROWS, 2, device="cuda")
    mask = torch.full((batch,), -1, dtype=torch.int64, device="cuda")
    each = torch.arange(batch, dtype=torch.int32, device="cuda")
    for i in range(count):
        slot = i * distinct + each % distinct if distinct else torch.full_like(each, -1)
        notes = History.blank(batch, "cuda")
        yield partial(steer_triton, streams[i, 0], streams[i, 1], plans, slot, mask, trace, notes)
