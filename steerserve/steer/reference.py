"""The op in plain torch: the oracle that every kernel is held to. Three stages at each hook point:

`note_reference` asks the conditions whose answers last, `steer_reference` edits, `hold_reference` makes sure
of what policies hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    SCALE,
    SHIFT,
    THRESHOLD,
    A,
    C,
    PointBuffers,
)
from .history import History

__all__ = ["EXACT", "SWEEPS", "hold_reference", "note_reference", "steer_reference"]

# Half-space projections before a row counts as one that cannot be held.
SWEEPS = 64
# A dot product read in another order differs by this share of √Σ(w·x)²; a stored value by that of its type.
EXACT = 2.0**-17


def note_reference(
    stream: Tensor,
    addend: Tensor | None,
    buffers: PointBuffers,
    token_slot: Tensor,
    token_rows: Tensor,
    history: History,
) -> None:
    """Ask the conditions whose answers outlast this hook point or this token, and note them.

    Where a condition of a row at a later hook point fails, its bit in the token's mask is cleared. Where the
    conditions of a row that latches or aborts hold, the position is noted, if it is the request's first.

    Args: as `steer_reference`; token_rows and history.since are changed.
    """
    for t in range(stream.shape[0]):
        slot = int(token_slot[t])
        if slot < 0 or not buffers.stateful[slot]:
            continue
        f, n = _activations(stream, addend, buffers, slot, t)
        holds = _gates(f, buffers, slot, n)
        for k in range(n):
            state = int(buffers.state[slot, k])
            if state == ASKED and not holds[k]:
                token_rows[t] &= ~_mask(int(buffers.bit[slot, k]))
            elif state in (LATCH, ABORT):
                listed = _has(token_rows[t], buffers.bit[slot, k])
                asked = _has(token_rows[t], buffers.condition[slot, k])
                if listed and asked and holds[k]:
                    _note(history, t, int(buffers.row[slot, k]))


def steer_reference(
    stream: Tensor,
    addend: Tensor | None,
    buffers: PointBuffers,
    token_slot: Tensor,
    token_rows: Tensor,
    trace: Tensor,
    history: History | None = None,
) -> None:
    """Edit the residual stream in place: x' = x + Σ_rows g·(f' − f)·d.

    Args:
        stream: [tokens, d], changed in place; where `addend` is given, the part of x that the next layer
        adds to.
        addend: [tokens, d] or None; the true residual stream is x = stream + addend.
        buffers: the rows of every slot.
        token_slot: [tokens] int32; −1 leaves the token untouched, bit for bit.
        token_rows: [tokens] int64; bit b set where the rows with bit b apply.
        trace: [tokens, K, 2] float32, filled with f and f' of rows that applied, NaN elsewhere.
        history: what is noted of the requests; may be left out where no row latches or is held.
    A row of a policy that cannot be held, for an activation is not finite, is noted: its request ends.

    Each row is one clipped affine map on a feature's activation, f' = min(max(a·f + c, lo), hi).
    """
    trace.fill_(torch.nan)
    for t in range(stream.shape[0]):
        slot = int(token_slot[t])
        if slot < 0 or int(buffers.count[slot]) == 0:
            continue
        f, n = _activations(stream, addend, buffers, slot, t)
        p = buffers.params[slot, :n]
        edited = torch.clamp(p[:, A] * f + p[:, C], p[:, LO], p[:, HI])
        holds = _gates(f, buffers, slot, n)
        applies = torch.zeros(n, dtype=torch.bool)
        for k in range(n):
            state, bit = int(buffers.state[slot, k]), buffers.bit[slot, k]
            open_ = bool(holds[k])
            if state == LATCH:
                assert history is not None
                open_ = bool(torch.isfinite(f).all()) and _is_latched(history, t, int(buffers.row[slot, k]))
            listed = state != ASKED and _has(token_rows[t], bit)
            applies[k] = open_ and listed
            if listed and buffers.mode[slot, k] == HOLD and not torch.isfinite(f).all():
                assert history is not None
                _note(history, t, int(buffers.row[slot, k]))
        if not applies.any():
            continue
        changes = applies & (buffers.mode[slot, :n] != OBSERVE)
        if changes.any():
            delta = torch.where(changes, edited - f, 0.0) @ buffers.decoder[slot, :n]
            stream[t] = (stream[t].float() + delta).to(stream.dtype)
        trace[t, :n, 0] = torch.where(applies, f, torch.nan)
        trace[t, :n, 1] = torch.where(applies, edited, torch.nan)


def hold_reference(
    stream: Tensor,
    addend: Tensor | None,
    buffers: PointBuffers,
    token_slot: Tensor,
    trace: Tensor,
    history: History,
) -> None:
    """Keep every held feature that applied at or under its ceiling, as whoever reads the stream next sees it.

    An ablation subtracts f·d, but the feature's encoder and decoder are not the same vector, and other rows
    add theirs: encoded again, f may be above 0. Each ceiling is a half-space w·x + b ≤ z_max; a token outside
    is moved along w, the shortest way, as often as it takes for all of them (at most `SWEEPS` times).
    What is checked is what is stored, rounded to the stream's type, and both sums that a reader may form:
    exact, and rounded. A token that cannot be brought inside is noted, and its request ends.

    Args: as `steer_reference`, after it; trace says which rows applied.
    Source: Agmon 1954, "The relaxation method for linear inequalities": projections on violated half-spaces.
    """
    for t in range(stream.shape[0]):
        slot = int(token_slot[t])
        if slot < 0 or not buffers.held[slot]:
            continue
        n = int(buffers.count[slot])
        rows = [k for k in range(n) if buffers.mode[slot, k] == HOLD and not torch.isnan(trace[t, k, 0])]
        for sweep in range(SWEEPS):
            outside = [k for k in rows if _pull(stream, addend, buffers, slot, t, k, sweep)]
            if not outside:
                break
        else:
            _note(history, t, int(buffers.row[slot, outside[-1]]))


def _pull(
    stream: Tensor, addend: Tensor | None, buffers: PointBuffers, slot: int, t: int, k: int, sweep: int
) -> bool:
    """Move a token into one half-space. Returns: whether it was outside."""
    w, p = buffers.encoder[slot, k], buffers.params[slot, k]
    own = stream[t].float()
    x = own + (0 if addend is None else addend[t].float())
    rounded = x.to(stream.dtype).float()
    spread = float(torch.linalg.vector_norm(w * torch.maximum(own.abs(), x.abs())))
    z = float(torch.maximum(w @ x, w @ rounded) + p[BIAS])
    two_sided = bool(p[BASE] > -torch.inf)
    room = spread * max(EXACT * 2, torch.finfo(stream.dtype).eps * 4) if two_sided else 0.0
    inside = z + spread * EXACT <= p[CEILING] + room and z + room >= p[BASE]
    if inside:
        return False
    margin = 0.0 if two_sided else spread * max(EXACT * 2, torch.finfo(stream.dtype).eps) * (1 + sweep)
    step = (float(p[CEILING]) - margin - z) / float(p[NORM])
    stream[t] = (own + step * w).to(stream.dtype)
    return True


def _activations(
    stream: Tensor, addend: Tensor | None, buffers: PointBuffers, slot: int, t: int
) -> tuple[Tensor, int]:
    n = int(buffers.count[slot])
    x = stream[t].float() + (0 if addend is None else addend[t].float())
    p = buffers.params[slot, :n]
    z = buffers.encoder[slot, :n] @ x + p[:, BIAS]
    value = torch.maximum(p[:, SCALE] * z + p[:, SHIFT], p[:, FLOOR])
    return torch.where(z > p[:, THRESHOLD], value, torch.zeros_like(value)), n


def _gates(f: Tensor, buffers: PointBuffers, slot: int, n: int) -> Tensor:
    above, below = buffers.above[slot, :n, :n], buffers.below[slot, :n, :n]
    return ((f > above) & (f < below)).all(dim=1)


def _mask(bit: int) -> int:
    """1 << bit as the signed number that an int64 holds."""
    return (1 << bit) - (1 << 64) * (bit == 63)


def _has(mask: Tensor, bit: Tensor) -> bool:
    return int(bit) >= 0 and bool((int(mask) >> int(bit)) & 1)


def _is_latched(history: History, t: int, row: int) -> bool:
    table = int(history.table[t])
    return table >= 0 and bool(history.since[table, row] <= history.position[t])


def _note(history: History, t: int, row: int) -> None:
    table = int(history.table[t])
    if table >= 0:
        history.since[table, row] = min(int(history.since[table, row]), int(history.position[t]))
