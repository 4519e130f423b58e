"""The last stage on a GPU: the stream is projected until every held feature is below its ceiling."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..buffers import BASE, BIAS, CEILING, HOLD, NORM, PARAMS, PointBuffers
from ..history import History
from ..reference import EXACT, SWEEPS
from .features import kernel_shape

__all__ = ["hold_triton"]

_BIAS, _CEILING, _BASE, _NORM = map(tl.constexpr, (BIAS, CEILING, BASE, NORM))
_HOLD, _PARAMS, _SWEEPS, _EXACT = map(tl.constexpr, (HOLD, PARAMS, SWEEPS, EXACT))


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
    shape = kernel_shape(buffers, width)
    # Its rows are taken one after the other.
    del shape["K"], shape["CHUNK"]
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
        **shape,
    )


@triton.jit
def _hold(
    stream: tl.tensor,
    addend: tl.tensor,
    stream_stride: tl.tensor,
    addend_stride: tl.tensor,
    token_slot: tl.tensor,
    encoder: tl.tensor,
    formulas: tl.tensor,
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
                p = formulas + (slot * ROWS + k) * _PARAMS
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
