"""The op on the CPU: compiled loops over the steered tokens, no Python per token or row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .buffers import (
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
    PLAIN,
    SCALE,
    SHIFT,
    THRESHOLD,
    A,
    C,
    PointBuffers,
)
from .history import History
from .reference import EXACT, SWEEPS, hold_reference

__all__ = ["hold_cpu", "note_cpu", "steer_cpu"]

# Reassociation lets the dot products vectorise; infinities and NaN keep their meaning (open bounds, trace).
_FASTMATH = {"reassoc", "contract", "arcp", "nsz"}


def note_cpu(
    stream: Tensor,
    addend: Tensor | None,
    buffers: PointBuffers,
    tokens: Tensor,
    token_slot: Tensor,
    token_rows: Tensor,
    history: History,
) -> None:
    """As `note_reference`, for the steered tokens only.

    Args:
        tokens: [n] int64, the indices of the steered tokens, ascending.
        token_slot, token_rows: [n] int32 and int64, of those tokens, as history.table and history.position;
            token_rows and history.since are changed.
    """

    def run(own: Any, other: Any, at: Any) -> None:
        b, notes = buffers.views, _notes(history)
        slots, stateful = token_slot.numpy(), buffers.stateful.numpy()
        _note(own, other, at, slots, token_rows.numpy(), *b, stateful, *notes)

    _on_bits(run, stream, addend, tokens, writes=False)


def steer_cpu(
    stream: Tensor,
    addend: Tensor | None,
    buffers: PointBuffers,
    tokens: Tensor,
    token_slot: Tensor,
    token_rows: Tensor,
    trace: Tensor,
    history: History | None = None,
) -> None:
    """As `steer_reference`, for the steered tokens only.

    Args:
        stream: [all tokens, d], changed in place.
        addend: [all tokens, d] or None.
        tokens: [n] int64, the indices of the steered tokens, ascending.
        token_slot, token_rows: [n] int32 and int64, of those tokens, as history.table and history.position.
        trace: [≥ n, K, 2] float32, row i belongs to tokens[i].
    """
    notes = _notes(history)

    def run(own: Any, other: Any, at: Any) -> None:
        slots, rows = token_slot.numpy(), token_rows.numpy()
        _steer(own, other, at, slots, rows, *buffers.views, trace.numpy(), *notes)

    _on_bits(run, stream, addend, tokens)


def hold_cpu(
    stream: Tensor,
    addend: Tensor | None,
    buffers: PointBuffers,
    tokens: Tensor,
    token_slot: Tensor,
    trace: Tensor,
    history: History,
) -> None:
    """As `hold_reference`, for the steered tokens only; arguments as `steer_cpu`."""
    if not _is_read_as_stored(stream, addend):
        _hold_gathered(stream, addend, buffers, tokens, token_slot, trace, history)
        return
    step = torch.finfo(stream.dtype).eps

    def run(own: Any, other: Any, at: Any) -> None:
        b = buffers.views
        notes = _notes(history)
        slots, held = token_slot.numpy(), buffers.held.numpy()
        _hold(
            own,
            other,
            at,
            slots,
            b.encoder,
            b.params,
            b.row,
            b.mode,
            b.used,
            held,
            trace.numpy(),
            step,
            *notes,
        )

    _on_bits(run, stream, addend, tokens)


def _hold_gathered(
    stream: Tensor,
    addend: Tensor | None,
    buffers: PointBuffers,
    tokens: Tensor,
    token_slot: Tensor,
    trace: Tensor,
    history: History,
) -> None:
    """What is held must be checked as it is stored, which a copy in float32 would not tell."""
    own = stream.index_select(0, tokens)
    extra = None if addend is None else addend.index_select(0, tokens)
    hold_reference(own, extra, buffers, token_slot, trace, history)
    stream.index_copy_(0, tokens, own)


def _notes(history: History | None) -> tuple[Any, Any, Any]:
    if history is None:
        return _NO_TABLE, _NO_POSITION, _NO_SINCE
    return history.table.numpy(), history.position.numpy(), history.since.numpy()


_NO_TABLE = np.empty(0, dtype=np.int32)
_NO_POSITION = np.empty(0, dtype=np.int64)
_NO_SINCE = np.empty((0, 0), dtype=np.int64)


def _on_bits(
    run: Callable[[Any, Any, Any], None],
    stream: Tensor,
    addend: Tensor | None,
    tokens: Tensor,
    *,
    writes: bool = True,
) -> None:
    """Run a loop on what it reads without a copy, or else on float32 copies of the tokens that it needs."""
    own = _bits(stream)
    other = own[:0] if addend is None and own is not None else _bits(addend)
    if own is not None and other is not None and own.dtype == other.dtype:
        run(own, other, tokens.numpy())
        return
    gathered = stream.index_select(0, tokens).float()
    extra = gathered[:0] if addend is None else addend.index_select(0, tokens).float()
    run(gathered.numpy(), extra.numpy(), np.arange(len(tokens)))
    if writes:
        stream.index_copy_(0, tokens, gathered.to(stream.dtype))


def _is_read_as_stored(stream: Tensor, addend: Tensor | None) -> bool:
    own = _bits(stream)
    other = own if addend is None else _bits(addend)
    return own is not None and other is not None and own.dtype == other.dtype


def _bits(part: Tensor | None) -> Any:
    """What the kernels read without a copy: float32, or the bits of bfloat16; None for other tensors."""
    if part is None or not part.is_contiguous():
        return None
    if part.dtype is torch.float32:
        return part.detach().numpy()
    return part.view(torch.uint16).numpy() if part.dtype is torch.bfloat16 else None


_F32 = "float32[:, :, ::1]"
_I32 = "int32[:, ::1]"
_BUFFERS = f"{', '.join([_F32] * 5)}, {', '.join([_I32] * 5)}, int32[::1], boolean[:, ::1]"
_HISTORY = "int32[::1], int64[::1], int64[:, ::1]"


def _signatures(rest: str) -> list[str]:
    """For streams of float32 and of bfloat16. Args: rest: what follows stream, addend, tokens and slots."""
    parts = ("float32[:, ::1]", "uint16[:, ::1]")
    return [f"void({part}, {part}, int64[::1], int32[::1], {rest})" for part in parts]


def _loop(rest: str) -> Callable[[Callable[..., None]], Any]:
    return numba.njit(  # type: ignore[no-any-return]
        _signatures(rest), fastmath=_FASTMATH, nogil=True, cache=True, boundscheck=False
    )


@numba.njit(inline="always")
def _round(bits: Any) -> Any:
    """float32 bits to bfloat16 bits: to nearest, ties to even."""
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@numba.njit(inline="always")
def _read(part: Any, at: Any, own: Any) -> None:
    """One token of the stream as float32; own [d]."""
    if part.itemsize == 2:
        bits = own.view(np.uint32)
        for i in range(own.shape[0]):
            bits[i] = np.uint32(part[at, i]) << np.uint32(16)
    else:
        for i in range(own.shape[0]):
            own[i] = part[at, i]


@numba.njit(inline="always")
def _write(part: Any, at: Any, own: Any) -> None:
    if part.itemsize == 2:
        bits = own.view(np.uint32)
        for i in range(own.shape[0]):
            part[at, i] = _round(bits[i])
    else:
        for i in range(own.shape[0]):
            part[at, i] = own[i]


@numba.njit(inline="always")
def _sum(own: Any, addend: Any, at: Any, other: Any, x: Any) -> None:
    """x = own + addend; `other` is a place for the addend."""
    if addend.shape[0] > 0:
        _read(addend, at, other)
        for i in range(x.shape[0]):
            x[i] = own[i] + other[i]
    else:
        for i in range(x.shape[0]):
            x[i] = own[i]


@numba.njit(inline="always")
def _activate(x: Any, slot: Any, n: Any, encoder: Any, params: Any, f: Any) -> bool:
    """f [n] of a slot's rows. Returns: whether all are finite."""
    finite = True
    for k in range(n):
        z = np.float32(0.0)
        for i in range(x.shape[0]):
            z += encoder[slot, k, i] * x[i]
        p = params[slot, k]
        z += p[BIAS]
        f[k] = max(p[SCALE] * z + p[SHIFT], p[FLOOR]) if z > p[THRESHOLD] else np.float32(0.0)
        finite = finite and -np.inf < f[k] < np.inf
    return finite


@numba.njit(inline="always")
def _open(f: Any, slot: Any, k: Any, n: Any, above: Any, below: Any) -> bool:
    """Whether a row's conditions hold."""
    holds = True
    for j in range(n):
        if not (f[j] > above[slot, k, j] and f[j] < below[slot, k, j]):
            holds = False
    return holds


@numba.njit(inline="always")
def _as_read(stream: Any, x: Any, rounded: Any) -> None:
    """The sum as a model that keeps it in the stream's type reads it."""
    if stream.itemsize == 2:
        source, target = x.view(np.uint32), rounded.view(np.uint32)
        for i in range(x.shape[0]):
            target[i] = np.uint32(_round(source[i])) << np.uint32(16)
    else:
        for i in range(x.shape[0]):
            rounded[i] = x[i]


@_loop(f"int64[::1], {_BUFFERS}, boolean[::1], {_HISTORY}")
def _note(
    stream: Any,
    addend: Any,
    tokens: Any,
    token_slot: Any,
    token_rows: Any,
    encoder: Any,
    decoder: Any,
    params: Any,
    above: Any,
    below: Any,
    bit: Any,
    row: Any,
    mode: Any,
    state: Any,
    condition: Any,
    count: Any,
    gated: Any,
    stateful: Any,
    table: Any,
    position: Any,
    since: Any,
) -> None:
    width = stream.shape[1]
    f = np.empty(encoder.shape[1], dtype=np.float32)
    own = np.empty(width, dtype=np.float32)
    x = np.empty(width, dtype=np.float32)
    other = np.empty(width, dtype=np.float32)
    for t in range(tokens.shape[0]):
        slot = token_slot[t]
        if slot < 0 or not stateful[slot]:
            continue
        n = count[slot]
        _read(stream, tokens[t], own)
        _sum(own, addend, tokens[t], other, x)
        finite = _activate(x, slot, n, encoder, params, f)
        for k in range(n):
            what = state[slot, k]
            if what == PLAIN:
                continue
            holds = finite and _open(f, slot, k, n, above, below)
            mask = token_rows[t]
            if what == ASKED:
                if not holds:
                    token_rows[t] = mask & ~(np.int64(1) << np.int64(bit[slot, k]))
                continue
            listed = (mask >> bit[slot, k]) & (mask >> condition[slot, k]) & 1
            if holds and listed and table[t] >= 0:
                at = row[slot, k]
                since[table[t], at] = min(since[table[t], at], position[t])


@_loop(f"int64[::1], {_BUFFERS}, float32[:, :, ::1], {_HISTORY}")
def _steer(
    stream: Any,
    addend: Any,
    tokens: Any,
    token_slot: Any,
    token_rows: Any,
    encoder: Any,
    decoder: Any,
    params: Any,
    above: Any,
    below: Any,
    bit: Any,
    row: Any,
    mode: Any,
    state: Any,
    condition: Any,
    count: Any,
    gated: Any,
    trace: Any,
    table: Any,
    position: Any,
    since: Any,
) -> None:
    width = stream.shape[1]
    f = np.empty(encoder.shape[1], dtype=np.float32)
    own = np.empty(width, dtype=np.float32)
    x = np.empty(width, dtype=np.float32)
    delta = np.empty(width, dtype=np.float32)
    other = np.empty(width, dtype=np.float32)
    for t in range(tokens.shape[0]):
        trace[t, :, :] = np.nan
        slot = token_slot[t]
        n = count[slot] if slot >= 0 else 0
        if n == 0:
            continue
        at = tokens[t]
        _read(stream, at, own)
        _sum(own, addend, at, other, x)
        finite = _activate(x, slot, n, encoder, params, f)
        changed = False
        for k in range(n):
            b = bit[slot, k]
            if b < 0 or ((token_rows[t] >> b) & 1) == 0 or state[slot, k] == ASKED:
                continue
            applies = finite
            if state[slot, k] == LATCH:
                applies = finite and table[t] >= 0 and since[table[t], row[slot, k]] <= position[t]
            elif gated[slot, k]:
                applies = finite and _open(f, slot, k, n, above, below)
            if not applies:
                if not finite and mode[slot, k] == HOLD and table[t] >= 0:
                    since[table[t], row[slot, k]] = min(since[table[t], row[slot, k]], position[t])
                continue
            p = params[slot, k]
            edited = min(max(p[A] * f[k] + p[C], p[LO]), p[HI])
            trace[t, k, 0] = f[k]
            trace[t, k, 1] = edited
            step = edited - f[k]
            if step != 0.0 and mode[slot, k] != OBSERVE:
                if changed:
                    for i in range(width):
                        delta[i] += step * decoder[slot, k, i]
                else:
                    for i in range(width):
                        delta[i] = step * decoder[slot, k, i]
                    changed = True
        if not changed:
            continue
        for i in range(width):
            own[i] += delta[i]
        _write(stream, at, own)


@_loop(f"{_F32}, {_F32}, {_I32}, {_I32}, int32[::1], boolean[::1], float32[:, :, ::1], float64, {_HISTORY}")
def _hold(
    stream: Any,
    addend: Any,
    tokens: Any,
    token_slot: Any,
    encoder: Any,
    params: Any,
    row: Any,
    mode: Any,
    count: Any,
    held: Any,
    trace: Any,
    step_size: Any,
    table: Any,
    position: Any,
    since: Any,
) -> None:
    width = stream.shape[1]
    own = np.empty(width, dtype=np.float32)
    x = np.empty(width, dtype=np.float32)
    rounded = np.empty(width, dtype=np.float32)
    largest = np.empty(width, dtype=np.float32)
    other = np.empty(width, dtype=np.float32)
    for t in range(tokens.shape[0]):
        slot = token_slot[t]
        if slot < 0 or not held[slot]:
            continue
        at = tokens[t]
        stale = True
        for sweep in range(SWEEPS):
            outside = -1
            for k in range(count[slot]):
                if mode[slot, k] != HOLD or trace[t, k, 0] != trace[t, k, 0]:
                    continue
                if stale:
                    _read(stream, at, own)
                    _sum(own, addend, at, other, x)
                    _as_read(stream, x, rounded)
                    for i in range(width):
                        largest[i] = max(abs(own[i]), abs(x[i]))
                    stale = False
                exact, coarse, square = np.float32(0.0), np.float32(0.0), np.float32(0.0)
                for i in range(width):
                    w = encoder[slot, k, i]
                    exact += w * x[i]
                    coarse += w * rounded[i]
                    square += (w * largest[i]) * (w * largest[i])
                p = params[slot, k]
                z = max(exact, coarse) + p[BIAS]
                spread = np.sqrt(square)
                two_sided = p[BASE] > -np.inf
                room = spread * max(EXACT * 2, step_size * 4) if two_sided else 0.0
                if z + spread * EXACT <= p[CEILING] + room and z + room >= p[BASE]:
                    continue
                margin = 0.0 if two_sided else spread * max(EXACT * 2, step_size) * (1 + sweep)
                shift = np.float32((p[CEILING] - margin - z) / p[NORM])
                for i in range(width):
                    own[i] += shift * encoder[slot, k, i]
                _write(stream, at, own)
                stale = True
                outside = k
            if outside < 0:
                break
            if sweep == SWEEPS - 1 and table[t] >= 0:
                number = row[slot, outside]
                since[table[t], number] = min(since[table[t], number], position[t])
