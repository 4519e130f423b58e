"""What the op did, counted on a GPU: each request's tokens, activations and edits, row by row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...recent import WINDOW, Recent
from ...tally import (
    COLUMNS,
    COUNT,
    FIRED,
    LOWERED,
    MAX_AFTER,
    MAX_BEFORE,
    MAX_ROWS,
    SUM_AFTER,
    SUM_BEFORE,
)
from ..buffers import PointBuffers

__all__ = ["count_triton"]

_COUNT, _SUM_BEFORE, _MAX_BEFORE = map(tl.constexpr, (COUNT, SUM_BEFORE, MAX_BEFORE))
_SUM_AFTER, _MAX_AFTER = map(tl.constexpr, (SUM_AFTER, MAX_AFTER))
_FIRED, _LOWERED, _COLUMNS = map(tl.constexpr, (FIRED, LOWERED, COLUMNS))
_MAX_ROWS, _WINDOW = map(tl.constexpr, (MAX_ROWS, WINDOW))
_TILE = 1024


def count_triton(
    table: Tensor,
    recent: Recent,
    token_slot: Tensor,
    token_table: Tensor,
    token_position: Tensor,
    settled: Tensor,
    limit: Tensor,
    buffers: PointBuffers,
    trace: Tensor,
) -> None:
    """As `Tallies.count`, for every token that has a slot.

    Args:
        table: [M, 128, 7] float64, added to; see `Tallies`.
        recent: [M, 128], which the last tokens go to, in the place of those that are added to the table.
        token_slot, token_table, token_position: [tokens], as `fill_triton` leaves them.
        settled, limit: [M] int64, half-open range of positions that count now, by table.
        buffers: the rows of every slot.
        trace: [≥ tokens, K, 2], as `steer_triton` leaves it.
    """
    tokens, rows = token_slot.shape[0], buffers.bit.shape[1]
    k = triton.next_power_of_2(rows)
    block = max(1, _TILE // k)
    _count[(triton.cdiv(tokens, block),)](
        table,
        recent.at,
        recent.values,
        token_slot,
        token_table,
        token_position,
        settled,
        limit,
        buffers.row,
        buffers.count,
        trace,
        TOKENS=tokens,
        ROWS=rows,
        K=k,
        BLOCK=block,
    )


@triton.jit
def _count(
    table: tl.tensor,
    recent_at: tl.tensor,
    recent_values: tl.tensor,
    token_slot: tl.tensor,
    token_table: tl.tensor,
    token_position: tl.tensor,
    settled: tl.tensor,
    limit: tl.tensor,
    number_of: tl.tensor,
    count: tl.tensor,
    trace: tl.tensor,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(token_slot + token, mask=token < TOKENS, other=-1)
    if tl.max(slot, axis=0) < 0:
        return
    number = tl.load(token_table + token, mask=slot >= 0, other=-1)
    known = number >= 0
    position = tl.load(token_position + token, mask=known, other=0)
    counted = known & (position >= tl.load(settled + number, mask=known, other=0))
    end = tl.load(limit + number, mask=known, other=0)
    counted = counted & (position < end)
    row = tl.arange(0, K)
    used = row[None, :] < tl.load(count + slot, mask=counted, other=0)[:, None]
    b = tl.load(number_of + slot.to(tl.int64)[:, None] * ROWS + row[None, :], mask=used, other=-1)
    told = trace + (token.to(tl.int64)[:, None] * ROWS + row[None, :]) * 2
    before = tl.load(told, mask=b >= 0, other=float("nan")).to(tl.float64)
    after = tl.load(told + 1, mask=b >= 0, other=float("nan")).to(tl.float64)
    applied = (b >= 0) & (before == before)

    # A step's last tokens take the places of older ones, and those are what is added. Of one request and row
    # no two of them share a place.
    is_recent = applied & (position >= end - _WINDOW)[:, None]
    cell = (number.to(tl.int64)[:, None] * _MAX_ROWS + b) * _WINDOW + (position % _WINDOW)[:, None]
    older = tl.load(recent_at + cell, mask=is_recent, other=-1)
    was_before = tl.load(recent_values + cell * 2, mask=is_recent, other=0.0).to(tl.float64)
    was_after = tl.load(recent_values + cell * 2 + 1, mask=is_recent, other=0.0).to(tl.float64)
    # What was there is read by all before anything is written.
    tl.debug_barrier()
    tl.store(recent_at + cell, tl.broadcast_to(position[:, None], cell.shape).to(tl.int32), mask=is_recent)
    tl.store(recent_values + cell * 2, before.to(tl.float32), mask=is_recent)
    tl.store(recent_values + cell * 2 + 1, after.to(tl.float32), mask=is_recent)
    before = tl.where(is_recent, was_before, before)
    after = tl.where(is_recent, was_after, after)
    applied = applied & ((is_recent == 0) | (older >= 0))

    # A prompt's tokens all belong to one table: those are added up here, lest thousands of atomics queue for
    # one place. A table has one slot, so its rows have the same bits in all of its tokens.
    one = tl.max(tl.where(counted, number, -1), axis=0)
    shared = applied & (number == one)[:, None]
    shared_bit = tl.max(tl.where(shared, b, -1), axis=0)
    _add(
        table + (one.to(tl.int64) * _MAX_ROWS + shared_bit) * _COLUMNS,
        shared_bit >= 0,
        tl.sum(shared.to(tl.float64), axis=0),
        tl.sum(tl.where(shared, before, 0.0), axis=0),
        tl.max(tl.where(shared, before, float("-inf")), axis=0),
        tl.sum(tl.where(shared, after, 0.0), axis=0),
        tl.max(tl.where(shared, after, float("-inf")), axis=0),
        tl.sum((shared & (before > 0)).to(tl.float64), axis=0),
        tl.sum((shared & (after < before)).to(tl.float64), axis=0),
    )
    _add(
        table + (number.to(tl.int64)[:, None] * _MAX_ROWS + b) * _COLUMNS,
        applied & (number != one)[:, None],
        applied.to(tl.float64),
        before,
        before,
        after,
        after,
        (before > 0).to(tl.float64),
        (after < before).to(tl.float64),
    )


@triton.jit
def _add(
    cell: tl.tensor,
    mask: tl.tensor,
    tokens: tl.tensor,
    sum_before: tl.tensor,
    max_before: tl.tensor,
    sum_after: tl.tensor,
    max_after: tl.tensor,
    fired: tl.tensor,
    lowered: tl.tensor,
) -> None:
    tl.atomic_add(cell + _FIRED, fired, mask=mask, sem="relaxed")
    tl.atomic_add(cell + _LOWERED, lowered, mask=mask, sem="relaxed")
    tl.atomic_add(cell + _COUNT, tokens, mask=mask, sem="relaxed")
    tl.atomic_add(cell + _SUM_BEFORE, sum_before, mask=mask, sem="relaxed")
    tl.atomic_max(cell + _MAX_BEFORE, max_before, mask=mask, sem="relaxed")
    tl.atomic_add(cell + _SUM_AFTER, sum_after, mask=mask, sem="relaxed")
    tl.atomic_max(cell + _MAX_AFTER, max_after, mask=mask, sem="relaxed")
