"""The op for plans that need a whole SAE: exact top-k, per-token normalisation, experts, `error: "drop"`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerserve.sae.resident import Resident

from .buffers import (
    ABORT,
    ASKED,
    BIAS,
    EDIT,
    FLOOR,
    HI,
    HOLD,
    LATCH,
    LO,
    OBSERVE,
    SCALE,
    SHIFT,
    THRESHOLD,
    A,
    C,
    PointBuffers,
)
from .history import NEVER, History

__all__ = ["steer_dense"]

_CONDITIONS_AT_ONCE = 2**24


def steer_dense(
    stream: Tensor,
    addend: Tensor | None,
    buffers: PointBuffers,
    tokens: Tensor,
    token_slot: Tensor,
    token_rows: Tensor,
    trace: Tensor,
    residents: Sequence[Resident | None],
    history: History,
) -> None:
    """As `note_reference` and `steer_reference`, for the tokens whose plan needs a whole SAE.

    Rows of a resident SAE take f from its encoder, and weigh f' − f by the token's gain. Where a slot drops
    the error, x' = decode(f) + Σ_rows g·gain·(f' − f)·d, which is the decoder's output for the edited
    features; a token no row of which is listed here keeps its error. A token is encoded only by the SAEs its
    slot needs. A token is left untouched where x, an f that is read, or what replaces x is NaN or infinite.

    Args:
        stream: [all tokens, d], changed in place.
        addend: [all tokens, d] or None; x = stream + addend.
        buffers: the rows of every slot; `resident` and `drop` in it are indices into `residents`.
        tokens: [m] int64, distinct indices into the stream.
        token_slot, token_rows: [m] int32 and int64, of those tokens.
        trace: [≥ m, K, 2] float32, row i belongs to tokens[i]; filled as the reference does.
        residents: the SAEs on the stream's device; None for one that no slot here names.
        history: of those tokens, in ascending order of position; token_rows and history.since are changed.
    """
    # Conditions are [tokens, K, K].
    step = max(1, _CONDITIONS_AT_ONCE // buffers.bit.shape[1] ** 2)
    step = min([step, *(resident.tokens_at_once for resident in residents if resident is not None)])
    for start in range(0, len(tokens), step):
        part = slice(start, start + step)
        at = tokens[part]
        own = stream.index_select(0, at)
        extra = None if addend is None else addend.index_select(0, at)
        rows = _Rows.of(buffers, token_slot[part], token_rows[part])
        notes = History(history.table[part], history.position[part], history.since)
        own_trace = trace[: len(tokens)][part]
        edited = _steered(own, extra, buffers, rows, residents, own_trace, notes, token_rows[part])
        stream.index_copy_(0, at, edited)


@dataclass(frozen=True)
class _Rows:
    """What a token's slot asks of it; m tokens, K rows, of which `used` hold something.

    slot [m]; used, listed [m, K]; live [m]: any row is listed; source [m, K] and drop [m]: indices of
    residents, −1 for none.
    """

    slot: Tensor
    used: Tensor
    listed: Tensor
    live: Tensor
    source: Tensor
    drop: Tensor

    @classmethod
    def of(cls, buffers: PointBuffers, token_slot: Tensor, token_rows: Tensor) -> _Rows:
        slot = token_slot.long().clamp(min=0)
        count = torch.where(token_slot >= 0, buffers.count.index_select(0, slot), 0)
        used = torch.arange(buffers.bit.shape[1], device=slot.device) < count.unsqueeze(1)
        bit = buffers.bit.index_select(0, slot)
        listed = used & (bit >= 0) & _has(token_rows, bit)
        live = listed.any(dim=1)
        wanted = (listed & (buffers.mode.index_select(0, slot) == EDIT)).any(dim=1)
        source = buffers.resident.index_select(0, slot)
        return cls(
            slot,
            used,
            listed,
            live,
            source.where(used & live.unsqueeze(1), -1),
            buffers.drop.index_select(0, slot).where(wanted, -1),
        )


@dataclass(frozen=True)
class _Read:
    """What was read of m tokens; the residents fill in their part.

    x [m, d] float32; f and gain [m, K], of every row; kept [m, d]: x, or its reconstruction where the slot
    drops the error.
    """

    x: Tensor
    f: Tensor
    gain: Tensor
    kept: Tensor


def _steered(
    own: Tensor,
    addend: Tensor | None,
    buffers: PointBuffers,
    rows: _Rows,
    residents: Sequence[Resident | None],
    trace: Tensor,
    history: History,
    token_rows: Tensor,
) -> Tensor:
    """The tokens' part of the stream after steering: [m, d], in its own dtype."""
    x = own.float() if addend is None else own.float() + addend.float()
    params = buffers.params.index_select(0, rows.slot)
    f = _by_formula(x, buffers, rows, params)
    read = _Read(x, f, torch.ones_like(f), x.clone())
    feature = buffers.feature.index_select(0, rows.slot)
    for index, tokens in _groups(rows.source, rows.drop):
        resident = residents[index]
        assert resident is not None
        _by_resident(resident, index, tokens, rows, feature, read)

    finite = (torch.isfinite(f) | ~rows.used).all(dim=1) & torch.isfinite(read.kept).all(dim=1)
    above, below = (part.index_select(0, rows.slot) for part in (buffers.above, buffers.below))
    holds = ((f.unsqueeze(1) > above) & (f.unsqueeze(1) < below)) | ~rows.used.unsqueeze(1)
    holds = holds.all(dim=2) & finite.unsqueeze(1)
    state, mode = (part.index_select(0, rows.slot) for part in (buffers.state, buffers.mode))
    _note(holds, finite, state, mode, buffers, rows, history, token_rows)
    latched = _since(buffers, rows, history) <= history.position.unsqueeze(1)
    holds = torch.where(state == LATCH, latched & finite.unsqueeze(1), holds)
    applies = rows.listed & holds & (state != ASKED)
    edited = torch.clamp(params[..., A] * f + params[..., C], params[..., LO], params[..., HI])

    change = torch.where(applies & (mode != OBSERVE), read.gain * (edited - f), 0.0)
    delta = read.kept - x
    for slot, tokens in _groups(rows.slot.where(rows.live, -1)):
        n = int(buffers.count[slot])
        delta.index_add_(0, tokens, change.index_select(0, tokens)[:, :n] @ buffers.decoder[slot, :n])
    trace[..., 0] = torch.where(applies, f, torch.nan)
    trace[..., 1] = torch.where(applies, edited, torch.nan)
    touched = (applies & (mode != OBSERVE)).any(dim=1) | ((rows.drop >= 0) & finite)
    return torch.where(touched.unsqueeze(1), (own.float() + delta).to(own.dtype), own)


def _note(
    holds: Tensor,
    finite: Tensor,
    state: Tensor,
    mode: Tensor,
    buffers: PointBuffers,
    rows: _Rows,
    history: History,
    token_rows: Tensor,
) -> None:
    """As `note_reference`, for m tokens. Args: holds, state, mode: [m, K]. finite: [m]."""
    bit, condition = (part.index_select(0, rows.slot) for part in (buffers.bit, buffers.condition))
    shut = rows.used & (state == ASKED) & ~holds
    masks = torch.where(shut, torch.ones_like(bit, dtype=torch.int64) << bit.clamp(min=0), 0)
    # No two rows ask under the same bit.
    token_rows &= ~masks.sum(dim=1)
    remembers = (state == LATCH) | (state == ABORT)
    first = rows.listed & remembers & holds & _has(token_rows, bit) & _has(token_rows, condition)
    lost = rows.listed & (mode == HOLD) & ~finite.unsqueeze(1)
    noted = (first | lost) & (history.table >= 0).unsqueeze(1)
    number = buffers.row.index_select(0, rows.slot)
    at = history.table.unsqueeze(1) * history.since.shape[1] + number
    here = history.position.unsqueeze(1).expand_as(at)
    flat = history.since.view(-1)
    flat.scatter_reduce_(0, at[noted].long(), here[noted], "amin")


def _since(buffers: PointBuffers, rows: _Rows, history: History) -> Tensor:
    """[m, K]: since when each row is latched; anything where a row is none."""
    number = buffers.row.index_select(0, rows.slot).clamp(0, history.since.shape[1] - 1)
    table = history.table.unsqueeze(1)
    return history.since[table.clamp(min=0).long(), number.long()].where(table >= 0, NEVER)


def _has(token_rows: Tensor, bit: Tensor) -> Tensor:
    """[m, K]: whether each row's bit is set in its token's mask."""
    return ((token_rows.unsqueeze(1) >> bit.clamp(min=0)) & 1).bool()


def _by_formula(x: Tensor, buffers: PointBuffers, rows: _Rows, params: Tensor) -> Tensor:
    """f of every row [m, K] as if each computed itself; any number where there is no row."""
    z = torch.zeros_like(params[..., BIAS])
    for slot, tokens in _groups(rows.slot.where(rows.live, -1)):
        n = int(buffers.count[slot])
        product = x.index_select(0, tokens) @ buffers.encoder[slot, :n].T
        z[:, :n].index_copy_(0, tokens, product)
    z += params[..., BIAS]
    value = torch.maximum(params[..., SCALE] * z + params[..., SHIFT], params[..., FLOOR])
    return torch.where(z > params[..., THRESHOLD], value, 0.0)


def _by_resident(
    resident: Resident, index: int, tokens: Tensor, rows: _Rows, feature: Tensor, read: _Read
) -> None:
    """Fill in what one SAE's whole encoder says of these tokens. Args: feature: [m, K] int64."""
    encoded = resident.encode(read.x.index_select(0, tokens))
    # One infinite pre-activation can push any other out of the top k, so the whole token must be finite. No
    # sum with an infinity of any sign is, and it takes less time than a look at each.
    exact = torch.isfinite(encoded.f.sum(dim=1)) & torch.isfinite(encoded.gain)
    mine = rows.source.index_select(0, tokens) == index
    values = encoded.f.gather(1, feature.index_select(0, tokens).where(mine, 0))
    values = torch.where(exact.unsqueeze(1), values, torch.nan)
    for known, new in ((read.f, values), (read.gain, encoded.gain.unsqueeze(1))):
        known.index_copy_(0, tokens, new.where(mine, known.index_select(0, tokens)))
    dropped = torch.nonzero(rows.drop.index_select(0, tokens) == index)[:, 0]
    if len(dropped):
        part = encoded.take(dropped)
        read.kept.index_copy_(0, tokens.index_select(0, dropped), resident.decode(part.f, part))


def _groups(*indices: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each index ≥ 0 that occurs, with the tokens in which it does. Args: indices: [m] or [m, K] each."""
    columns = torch.cat([part.reshape(part.shape[0], -1) for part in indices], dim=1)
    for index in columns.unique().tolist():
        if index >= 0:
            yield index, torch.nonzero((columns == index).any(dim=1))[:, 0]
