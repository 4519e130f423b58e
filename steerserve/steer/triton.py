"""The op on a GPU, the token map it reads, and the count of what it did: kernels and their launchers.

Every launcher is one launch (and a fill) whose grid follows from shapes alone. Nothing is allocated, nothing
is copied back and nothing waits, so all of it can be recorded in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tally import (
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
from ..tokens import Batch
from .buffers import (
    ABORT,
    ASKED,
    BASE,
    BIAS,
    CEILING,
    FLOOR,
    HI,
    HOLD,
    LATCH,
    LO,
    NORM,
    OBSERVE,
    PARAMS,
    PLAIN,
    SCALE,
    SHIFT,
    THRESHOLD,
    A,
    C,
    PointBuffers,
)
from .history import NEVER, History
from .reference import EXACT, SWEEPS

__all__ = ["DeviceBatch", "count_triton", "fill_triton", "hold_triton", "note_triton", "steer_triton"]

# A kernel sees a global only as a constexpr.
_BIAS, _THRESHOLD, _SCALE, _SHIFT, _FLOOR = map(tl.constexpr, (BIAS, THRESHOLD, SCALE, SHIFT, FLOOR))
_A, _C, _LO, _HI, _PARAMS = map(tl.constexpr, (A, C, LO, HI, PARAMS))
_CEILING, _BASE, _NORM, _HOLD, _OBSERVE = map(tl.constexpr, (CEILING, BASE, NORM, HOLD, OBSERVE))
_PLAIN, _LATCH, _ABORT, _ASKED, _NEVER = map(tl.constexpr, (PLAIN, LATCH, ABORT, ASKED, NEVER))
_SWEEPS, _EXACT = map(tl.constexpr, (SWEEPS, EXACT))
_COUNT, _SUM_BEFORE, _MAX_BEFORE = map(tl.constexpr, (COUNT, SUM_BEFORE, MAX_BEFORE))
_SUM_AFTER, _MAX_AFTER = map(tl.constexpr, (SUM_AFTER, MAX_AFTER))
_FIRED, _LOWERED, _COLUMNS = map(tl.constexpr, (FIRED, LOWERED, COLUMNS))
_MAX_ROWS = tl.constexpr(MAX_ROWS)
_ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)

# A tile of weights is 8 rows (few plans name more; further ones come in further chunks, which find x in the
# cache) by 128 columns a warp: eight loads of 16 bytes a thread, all in the same four columns, so that a
# sum over rows stays in the thread. 16 warps have 32 to 64 KiB in flight (ptxas spreads the loads a
# little); a multiprocessor's share of an H200's memory is 4.8 TB/s / 132 × 1 µs of latency = 36 KiB. At 64
# registers a thread, whatever K is, two programs share a multiprocessor: one reads while the other adds up,
# and 256 tokens run at once.
_CHUNK = 8
_COLUMNS_PER_WARP = 128
_MOST_WARPS = 16
_FILL_BLOCK = 1024
_COUNT_TILE = 1024


def note_triton(
    stream: Tensor,
    addend: Tensor | None,
    buffers: PointBuffers,
    token_slot: Tensor,
    token_rows: Tensor,
    history: History,
) -> None:
    """As `note_reference`; of several tokens of a request the first one counts."""
    tokens, width = stream.shape
    _note[(tokens,)](
        stream,
        addend,
        stream.stride(0),
        0 if addend is None else addend.stride(0),
        token_slot,
        token_rows,
        buffers.encoder,
        buffers.params,
        buffers.above,
        buffers.below,
        buffers.bit,
        buffers.row,
        buffers.state,
        buffers.condition,
        buffers.count,
        buffers.stateful,
        history.table,
        history.position,
        history.since,
        NOTES=history.since.shape[1],
        **_shape(buffers, width),
    )


def steer_triton(
    stream: Tensor,
    addend: Tensor | None,
    buffers: PointBuffers,
    token_slot: Tensor,
    token_rows: Tensor,
    trace: Tensor,
    history: History,
) -> None:
    """As `steer_reference`, but the trace of a token is written only where its slot has rows.

    What stands there for other tokens is older; `count_triton` passes over them, by their slot. A token whose
    rows change nothing keeps its bits.

    Args: stream, addend: rows may lie apart, columns must not.
    """
    tokens, width = stream.shape
    _steer[(tokens,)](
        stream,
        addend,
        stream.stride(0),
        0 if addend is None else addend.stride(0),
        token_slot,
        token_rows,
        buffers.encoder,
        buffers.decoder,
        buffers.params,
        buffers.above,
        buffers.below,
        buffers.bit,
        buffers.row,
        buffers.mode,
        buffers.state,
        buffers.count,
        buffers.gated,
        buffers.stateful,
        buffers.held,
        trace,
        history.table,
        history.position,
        history.since,
        NOTES=history.since.shape[1],
        **_shape(buffers, width),
    )


def hold_triton(
    stream: Tensor,
    addend: Tensor | None,
    buffers: PointBuffers,
    token_slot: Tensor,
    trace: Tensor,
    history: History,
) -> None:
    """As `hold_reference`."""
    tokens, width = stream.shape
    shape = _shape(buffers, width)
    _hold[(tokens,)](
        stream,
        addend,
        stream.stride(0),
        0 if addend is None else addend.stride(0),
        token_slot,
        buffers.encoder,
        buffers.params,
        buffers.row,
        buffers.mode,
        buffers.count,
        buffers.held,
        trace,
        history.table,
        history.position,
        history.since,
        STEP=torch.finfo(stream.dtype).eps,
        NOTES=history.since.shape[1],
        WIDTH=width,
        ROWS=shape["ROWS"],
        BLOCK=shape["BLOCK"],
        num_warps=shape["num_warps"],
    )


def _shape(buffers: PointBuffers, width: int) -> dict[str, int]:
    """The constants of a kernel whose programs have a token each."""
    rows = buffers.bit.shape[1]
    warps = min(_MOST_WARPS, triton.cdiv(triton.next_power_of_2(width), _COLUMNS_PER_WARP))
    return {
        "WIDTH": width,
        "ROWS": rows,
        "K": max(_CHUNK, triton.next_power_of_2(rows)),
        "CHUNK": _CHUNK,
        "BLOCK": warps * _COLUMNS_PER_WARP,
        "num_warps": warps,
    }


@triton.jit
def _note(
    stream: tl.tensor,
    addend: tl.tensor,
    stream_stride: tl.tensor,
    addend_stride: tl.tensor,
    token_slot: tl.tensor,
    token_rows: tl.tensor,
    encoder: tl.tensor,
    params: tl.tensor,
    above: tl.tensor,
    below: tl.tensor,
    bit: tl.tensor,
    number: tl.tensor,
    state: tl.tensor,
    condition: tl.tensor,
    count: tl.tensor,
    stateful: tl.tensor,
    table: tl.tensor,
    position: tl.tensor,
    since: tl.tensor,
    NOTES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slot + token).to(tl.int64)
    if slot < 0:
        return
    if tl.load(stateful + slot) == 0:
        return
    n = tl.load(count + slot)
    base = slot * ROWS
    row = tl.arange(0, K)
    used = row < n
    own = stream + token * stream_stride
    z = _encoded(own, addend, token * addend_stride, encoder + base * WIDTH, n, row, WIDTH, CHUNK, BLOCK)
    f = _activated(z, params + base * _PARAMS, row, used)
    what = tl.load(state + base + row, mask=used, other=_PLAIN)
    infinite = used & ~((f > float("-inf")) & (f < float("inf")))
    holds = _open(above + base * ROWS, below + base * ROWS, f, n, row, ROWS, CHUNK)
    holds = holds & (tl.sum(infinite.to(tl.int32), axis=0) == 0)

    mask = tl.load(token_rows + token)
    b = tl.maximum(tl.load(bit + base + row, mask=used, other=0), 0).to(tl.int64)
    c = tl.maximum(tl.load(condition + base + row, mask=used, other=0), 0).to(tl.int64)
    one = (row * 0 + 1).to(tl.int64)
    # No two rows ask under the same bit.
    shut = tl.sum(tl.where((what == _ASKED) & ~holds, one << b, 0), axis=0)
    mask = mask & ~shut
    tl.store(token_rows + token, mask)
    listed = ((mask >> b) & (mask >> c) & 1) != 0
    request = tl.load(table + token)
    if request >= 0:
        first = ((what == _LATCH) | (what == _ABORT)) & listed & holds
        at = since + request.to(tl.int64) * NOTES + tl.load(number + base + row, mask=used, other=0)
        here = (row * 0).to(tl.int64) + tl.load(position + token)
        tl.atomic_min(at, here, mask=first, sem="relaxed")


@triton.jit
def _activated(z: tl.tensor, params: tl.tensor, row: tl.tensor, used: tl.tensor) -> tl.tensor:
    """[K] f of a slot's rows from their dot products."""
    p = params + row * _PARAMS
    z += tl.load(p + _BIAS, mask=used, other=0.0)
    value = tl.load(p + _SCALE, mask=used, other=0.0) * z + tl.load(p + _SHIFT, mask=used, other=0.0)
    value = tl.maximum(value, tl.load(p + _FLOOR, mask=used, other=0.0), propagate_nan=_ALL_NAN)
    return tl.where(z > tl.load(p + _THRESHOLD, mask=used, other=0.0), value, 0.0)


@triton.jit
def _steer(
    stream: tl.tensor,
    addend: tl.tensor,
    stream_stride: tl.tensor,
    addend_stride: tl.tensor,
    token_slot: tl.tensor,
    token_rows: tl.tensor,
    encoder: tl.tensor,
    decoder: tl.tensor,
    params: tl.tensor,
    above: tl.tensor,
    below: tl.tensor,
    bit: tl.tensor,
    number: tl.tensor,
    mode: tl.tensor,
    state: tl.tensor,
    count: tl.tensor,
    gated: tl.tensor,
    stateful: tl.tensor,
    held: tl.tensor,
    trace: tl.tensor,
    table: tl.tensor,
    position: tl.tensor,
    since: tl.tensor,
    NOTES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slot + token).to(tl.int64)
    if slot < 0:
        return
    n = tl.load(count + slot)
    if n == 0:
        return
    base = slot * ROWS
    row = tl.arange(0, K)
    used = row < n
    own = stream + token * stream_stride
    z = _encoded(own, addend, token * addend_stride, encoder + base * WIDTH, n, row, WIDTH, CHUNK, BLOCK)
    f = _activated(z, params + base * _PARAMS, row, used)
    p = params + (base + row) * _PARAMS
    edited = tl.load(p + _A, mask=used, other=0.0) * f + tl.load(p + _C, mask=used, other=0.0)
    edited = tl.maximum(edited, tl.load(p + _LO, mask=used, other=0.0), propagate_nan=_ALL_NAN)
    edited = tl.minimum(edited, tl.load(p + _HI, mask=used, other=0.0), propagate_nan=_ALL_NAN)

    b = tl.load(bit + base + row, mask=used, other=-1)
    listed = (b >= 0) & (((tl.load(token_rows + token) >> tl.maximum(b, 0).to(tl.int64)) & 1) != 0)
    what = tl.load(state + base + row, mask=used, other=_PLAIN)
    listed = listed & (what != _ASKED)
    # The reference's open gates are −∞ < f < ∞ for every row that is read.
    infinite = used & ~((f > float("-inf")) & (f < float("inf")))
    finite = tl.sum(infinite.to(tl.int32), axis=0) == 0
    applies = listed & finite
    if tl.max(tl.load(gated + base + row, mask=used, other=0).to(tl.int32), axis=0) > 0:
        holds = _open(above + base * ROWS, below + base * ROWS, f, n, row, ROWS, CHUNK)
        applies = applies & (holds | (what == _LATCH))
    request = tl.load(table + token).to(tl.int64)
    here = tl.load(position + token)
    notes = since + request * NOTES + tl.load(number + base + row, mask=used, other=0)
    if tl.load(stateful + slot) != 0:
        began = tl.load(notes, mask=listed & (what == _LATCH) & (request >= 0), other=_NEVER)
        applies = applies & ((what != _LATCH) | (began <= here))
    how = tl.load(mode + base + row, mask=used, other=_OBSERVE)
    if tl.load(held + slot) != 0:
        lost = listed & (how == _HOLD) & (request >= 0) & ~finite
        tl.atomic_min(notes, (row * 0).to(tl.int64) + here, mask=lost, sem="relaxed")

    told = trace + (token * ROWS + row) * 2
    tl.store(told, tl.where(applies, f, float("nan")), mask=row < ROWS)
    tl.store(told + 1, tl.where(applies, edited, float("nan")), mask=row < ROWS)
    step = tl.where(applies & (how != _OBSERVE), edited - f, 0.0)
    if tl.max((step != 0.0).to(tl.int32), axis=0) > 0:
        _add_decoded(own, decoder + base * WIDTH, step, n, WIDTH, CHUNK, BLOCK)


@triton.jit
def _hold(
    stream: tl.tensor,
    addend: tl.tensor,
    stream_stride: tl.tensor,
    addend_stride: tl.tensor,
    token_slot: tl.tensor,
    encoder: tl.tensor,
    params: tl.tensor,
    number: tl.tensor,
    mode: tl.tensor,
    count: tl.tensor,
    held: tl.tensor,
    trace: tl.tensor,
    table: tl.tensor,
    position: tl.tensor,
    since: tl.tensor,
    STEP: tl.constexpr,
    NOTES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slot + token).to(tl.int64)
    if slot < 0:
        return
    if tl.load(held + slot) == 0:
        return
    n = tl.load(count + slot)
    own = stream + token * stream_stride
    sweep = 0
    last = n * 0
    while sweep < _SWEEPS:
        last = n * 0 - 1
        for k in range(n):
            before = tl.load(trace + (token * ROWS + k) * 2)
            if (tl.load(mode + slot * ROWS + k) == _HOLD) & (before == before):
                w = encoder + (slot * ROWS + k) * WIDTH
                p = params + (slot * ROWS + k) * _PARAMS
                shift = _outside(own, addend, token * addend_stride, w, p, sweep, STEP, WIDTH, BLOCK)
                if shift != 0.0:
                    _move(own, w, shift, WIDTH, BLOCK)
                    # What other threads of the program have stored is read next.
                    tl.debug_barrier()
                    last = k
        sweep = tl.where(last < 0, _SWEEPS, sweep + 1)
    request = tl.load(table + token).to(tl.int64)
    if (last >= 0) & (request >= 0):
        note = since + request * NOTES + tl.load(number + slot * ROWS + last)
        tl.atomic_min(note, tl.load(position + token), sem="relaxed")


@triton.jit
def _outside(
    own: tl.tensor,
    addend: tl.tensor,
    addend_at: tl.tensor,
    w: tl.tensor,
    p: tl.tensor,
    sweep: tl.tensor,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """How far along w a token must move to be inside; 0 where it is."""
    exact = tl.zeros([BLOCK], tl.float32)
    coarse = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < WIDTH
        mine = tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
        x = mine
        if addend is not None:
            x += tl.load(addend + addend_at + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(w + at, mask=inside, other=0.0)
        exact += weight * x
        coarse += weight * x.to(own.dtype.element_ty).to(tl.float32)
        largest = weight * tl.maximum(tl.abs(mine), tl.abs(x))
        square += largest * largest
    z = tl.maximum(tl.sum(exact, axis=0), tl.sum(coarse, axis=0)) + tl.load(p + _BIAS)
    spread = tl.sqrt(tl.sum(square, axis=0))
    ceiling, base = tl.load(p + _CEILING), tl.load(p + _BASE)
    two_sided = base > float("-inf")
    room = tl.where(two_sided, spread * tl.maximum(_EXACT * 2, STEP * 4), 0.0)
    ok = (z + spread * _EXACT <= ceiling + room) & (z + room >= base)
    margin = tl.where(two_sided, 0.0, spread * tl.maximum(_EXACT * 2, STEP) * (1 + sweep))
    shift = (ceiling - margin - z) / tl.load(p + _NORM)
    return tl.where(ok, 0.0, shift)


@triton.jit
def _move(own: tl.tensor, w: tl.tensor, shift: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """`own` += shift·w."""
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < WIDTH
        before = tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
        moved = before + shift * tl.load(w + at, mask=inside, other=0.0)
        tl.store(own + at, moved.to(own.dtype.element_ty), mask=inside)


@triton.jit
def _encoded(
    own: tl.tensor,
    addend: tl.tensor,
    addend_at: tl.tensor,
    encoder: tl.tensor,
    n: tl.tensor,
    row: tl.tensor,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """[K] the rows' dot products with x = own + addend."""
    z = (row * 0).to(tl.float32)
    for first in range(0, n, CHUNK):
        i = first + tl.arange(0, CHUNK)
        dots = tl.zeros([CHUNK, BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < WIDTH
            x = tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
            if addend is not None:
                x += tl.load(addend + addend_at + at, mask=inside, other=0.0).to(tl.float32)
            weights = encoder + i[:, None] * WIDTH + at[None, :]
            dots += tl.load(weights, mask=(i < n)[:, None] & inside[None, :], other=0.0) * x[None, :]
        z = _placed(tl.sum(dots, axis=1), first, z, row, CHUNK)
    return z


@triton.jit
def _open(
    above: tl.tensor,
    below: tl.tensor,
    f: tl.tensor,
    n: tl.tensor,
    row: tl.tensor,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """[K] whether above[k, j] < f[j] < below[k, j] for all j."""
    shut = row * 0
    for first in range(0, n, CHUNK):
        i = first + tl.arange(0, CHUNK)
        gate = i[:, None] * ROWS + row[None, :]
        read = (i < n)[:, None] & (row < n)[None, :]
        over = f[None, :] > tl.load(above + gate, mask=read, other=float("-inf"))
        under = f[None, :] < tl.load(below + gate, mask=read, other=float("inf"))
        shut = _placed(tl.sum((read & ~(over & under)).to(tl.int32), axis=1), first, shut, row, CHUNK)
    return shut == 0


@triton.jit
def _add_decoded(
    own: tl.tensor,
    decoder: tl.tensor,
    step: tl.tensor,
    n: tl.tensor,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`own` += step @ decoder; rows with a step of 0 are not read."""
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < WIDTH
        before = tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
        delta = tl.zeros([BLOCK], tl.float32)
        for first in range(0, n, CHUNK):
            i = first + tl.arange(0, CHUNK)
            size = tl.gather(step, i, axis=0)
            weights = decoder + i[:, None] * WIDTH + at[None, :]
            rows = tl.load(weights, mask=(size != 0.0)[:, None] & inside[None, :], other=0.0)
            delta += tl.sum(size[:, None] * rows, axis=0)
        tl.store(own + at, (before + delta).to(own.dtype.element_ty), mask=inside)


@triton.jit
def _placed(
    chunk: tl.tensor, first: tl.tensor, whole: tl.tensor, row: tl.tensor, CHUNK: tl.constexpr
) -> tl.tensor:
    """`whole` [K] with the values of `chunk` [CHUNK] from row `first` on, a multiple of CHUNK."""
    return tl.where(row // CHUNK == first // CHUNK, tl.gather(chunk, row % CHUNK, axis=0), whole)


@dataclass(frozen=True)
class DeviceBatch:
    """`tokens.Batch` on the device, and table [R] int32: each request's number in `Tallies`, −1 for none."""

    table: Tensor
    slot: Tensor
    special_ok: Tensor
    piece_at: Tensor
    piece_start: Tensor
    piece_base: Tensor
    piece_eligible: Tensor
    named_at: Tensor
    named_id: Tensor
    named_include: Tensor
    named_exclude: Tensor

    @classmethod
    def of(cls, batch: Batch, tables: Sequence[int], device: torch.device | str) -> DeviceBatch:
        """Send a batch's layout to the device, in one copy that the host does not wait for."""
        arrays = {"table": np.array(tables, dtype=np.int32)}
        arrays |= {field.name: getattr(batch, field.name) for field in fields(batch)}
        # At multiples of 16 bytes: kernels are compiled anew for pointers that are not.
        ends = list(accumulate(-(-array.nbytes // 16) * 16 for array in arrays.values()))
        begins = zip(arrays, [0, *ends[:-1]], strict=True)
        places = {name: slice(begin, begin + arrays[name].nbytes) for name, begin in begins}
        # From pageable memory the copy would wait for all that the device has yet to do.
        packed = torch.zeros(ends[-1], dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
        for name, array in arrays.items():
            packed.numpy()[places[name]] = array.view(np.uint8)
        sent = packed.to(device, non_blocking=True)
        dtypes = {name: getattr(torch, array.dtype.name) for name, array in arrays.items()}
        return cls(**{name: sent[place].view(dtypes[name]) for name, place in places.items()})


def fill_triton(
    layout: DeviceBatch,
    starts: Tensor,
    positions: Tensor,
    token_ids: Tensor,
    special: Tensor,
    token_slot: Tensor,
    token_rows: Tensor,
    token_table: Tensor,
    token_position: Tensor,
    since: Tensor,
) -> None:
    """As `TokenMap.fill`, but every token has an entry in its own place; slot −1 where it is not steered.

    Args:
        layout: R requests.
        starts: [≥ R + 1] int32, where each request's tokens begin in the batch.
        positions: [≥ T] int64, each token's position in its request.
        token_ids: [≥ T] int32 or int64.
        special: [vocab] bool, which token ids are special.
        token_slot: [max_tokens] int32, written whole. token_rows [max_tokens] int64, token_table [max_tokens]
        int32 and token_position [max_tokens] int64 are written for steered tokens alone.
        since: [M, R] int64, as in `History`; notes at positions that are computed again are taken back.
    """
    token_slot.fill_(-1)
    _fill[(layout.slot.shape[0],)](
        layout.table,
        layout.slot,
        layout.special_ok,
        layout.piece_at,
        layout.piece_start,
        layout.piece_base,
        layout.piece_eligible,
        layout.named_at,
        layout.named_id,
        layout.named_include,
        layout.named_exclude,
        starts,
        positions,
        token_ids,
        special,
        special.shape[0],
        token_slot,
        token_rows,
        token_table,
        token_position,
        since,
        NOTES=since.shape[1],
        BLOCK=_FILL_BLOCK,
    )


@triton.jit
def _fill(
    table: tl.tensor,
    slot: tl.tensor,
    special_ok: tl.tensor,
    piece_at: tl.tensor,
    piece_start: tl.tensor,
    piece_base: tl.tensor,
    piece_eligible: tl.tensor,
    named_at: tl.tensor,
    named_id: tl.tensor,
    named_include: tl.tensor,
    named_exclude: tl.tensor,
    starts: tl.tensor,
    positions: tl.tensor,
    token_ids: tl.tensor,
    special: tl.tensor,
    vocab: tl.tensor,
    token_slot: tl.tensor,
    token_rows: tl.tensor,
    token_table: tl.tensor,
    token_position: tl.tensor,
    since: tl.tensor,
    NOTES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    request = tl.program_id(0)
    own_slot = tl.load(slot + request)
    if own_slot < 0:
        return
    number = tl.load(table + request)
    allowed = tl.load(special_ok + request)
    piece, pieces_end = tl.load(piece_at + request), tl.load(piece_at + request + 1)
    named, named_end = tl.load(named_at + request), tl.load(named_at + request + 1)
    begin, end = tl.load(starts + request), tl.load(starts + request + 1)
    if (number >= 0) & (begin < end):
        note = since + number.to(tl.int64) * NOTES + tl.arange(0, NOTES)
        noted, first = tl.load(note), tl.load(positions + begin)
        again = (noted >= first) & (noted < first + (end - begin))
        tl.store(note, tl.where(again, _NEVER, noted))
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        present = at < end
        position = tl.load(positions + at, mask=present, other=0)
        token = tl.load(token_ids + at, mask=present, other=0).to(tl.int64)
        mask = tl.zeros([BLOCK], tl.int64) + tl.load(piece_base + piece)
        eligible = tl.zeros([BLOCK], tl.int64) + tl.load(piece_eligible + piece)
        for later in range(piece + 1, pieces_end):
            begun = position >= tl.load(piece_start + later)
            mask = tl.where(begun, tl.load(piece_base + later), mask)
            eligible = tl.where(begun, tl.load(piece_eligible + later), eligible)
        for k in range(named, named_end):
            included = mask | (tl.load(named_include + k) & eligible)
            hit = token == tl.load(named_id + k)
            mask = tl.where(hit, included & ~tl.load(named_exclude + k), mask)
        in_vocab = present & (token >= 0) & (token < vocab)
        is_special = tl.load(special + token, mask=in_vocab, other=0) != 0
        mask = tl.where(is_special, mask & allowed, mask)
        steered = present & (mask != 0)
        tl.store(token_slot + at, tl.zeros([BLOCK], tl.int32) + own_slot, mask=steered)
        tl.store(token_rows + at, mask, mask=steered)
        tl.store(token_table + at, tl.zeros([BLOCK], tl.int32) + number, mask=steered)
        tl.store(token_position + at, position, mask=steered)


def count_triton(
    table: Tensor,
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
        token_slot, token_table, token_position: [tokens], as `fill_triton` leaves them.
        settled, limit: [M] int64, half-open range of positions that count now, by table.
        buffers: the rows of every slot.
        trace: [≥ tokens, K, 2], as `steer_triton` leaves it.
    """
    tokens, rows = token_slot.shape[0], buffers.bit.shape[1]
    k = triton.next_power_of_2(rows)
    block = max(1, _COUNT_TILE // k)
    _count[(triton.cdiv(tokens, block),)](
        table,
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
    counted = counted & (position < tl.load(limit + number, mask=known, other=0))
    row = tl.arange(0, K)
    used = row[None, :] < tl.load(count + slot, mask=counted, other=0)[:, None]
    b = tl.load(number_of + slot.to(tl.int64)[:, None] * ROWS + row[None, :], mask=used, other=-1)
    told = trace + (token.to(tl.int64)[:, None] * ROWS + row[None, :]) * 2
    before = tl.load(told, mask=b >= 0, other=float("nan")).to(tl.float64)
    after = tl.load(told + 1, mask=b >= 0, other=float("nan")).to(tl.float64)
    applied = (b >= 0) & (before == before)

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
