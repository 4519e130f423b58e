"""The second stage on a GPU: the edits of a token's slot, decoded and added to the stream."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..buffers import ASKED, HI, HOLD, LATCH, LO, OBSERVE, PARAMS, PLAIN, A, C, PointBuffers
from ..history import NEVER, History
from .features import features, gates_open, kernel_shape

__all__ = ["steer_triton"]

_A, _C, _LO, _HI, _PARAMS = map(tl.constexpr, (A, C, LO, HI, PARAMS))
_PLAIN, _LATCH, _ASKED, _NEVER = map(tl.constexpr, (PLAIN, LATCH, ASKED, NEVER))
_HOLD, _OBSERVE, _ALL_NAN = map(tl.constexpr, (HOLD, OBSERVE, tl.PropagateNan.ALL))


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
        **kernel_shape(buffers, width),
    )


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
    formulas: tl.tensor,
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
    f = features(own, addend, token * addend_stride, encoder, formulas, base, n, row, WIDTH, CHUNK, BLOCK)
    p = formulas + (base + row) * _PARAMS
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
        holds = gates_open(above + base * ROWS, below + base * ROWS, f, n, row, ROWS, CHUNK)
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
