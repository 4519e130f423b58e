"""The token map on a GPU: which slot, rows and table each token of a step has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tokens import Batch
from ..crossing import sent
from ..history import NEVER

__all__ = ["DeviceBatch", "fill_triton"]

_NEVER = tl.constexpr(NEVER)
_BLOCK = 1024


@dataclass(frozen=True)
class DeviceBatch:
    """`tokens.Batch` on the device, and table [R] int32: each request's number in `Tallies`, −1 for none."""

    table: Tensor
    slot: Tensor
    piece_at: Tensor
    piece_start: Tensor
    piece_base: Tensor
    piece_eligible: Tensor
    piece_special: Tensor
    named_at: Tensor
    named_id: Tensor
    named_include: Tensor
    named_exclude: Tensor

    @classmethod
    def of(cls, batch: Batch, tables: Sequence[int], device: torch.device | str) -> DeviceBatch:
        """Send a batch's layout to the device, in one copy that the host does not wait for."""
        arrays = {"table": np.array(tables, dtype=np.int32)}
        arrays |= {field.name: getattr(batch, field.name) for field in fields(batch)}
        return cls(**sent(arrays, device))


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
        layout.piece_at,
        layout.piece_start,
        layout.piece_base,
        layout.piece_eligible,
        layout.piece_special,
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
        BLOCK=_BLOCK,
    )


@triton.jit
def _fill(
    table: tl.tensor,
    slot: tl.tensor,
    piece_at: tl.tensor,
    piece_start: tl.tensor,
    piece_base: tl.tensor,
    piece_eligible: tl.tensor,
    piece_special: tl.tensor,
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
        allowed = tl.zeros([BLOCK], tl.int64) + tl.load(piece_special + piece)
        for later in range(piece + 1, pieces_end):
            begun = position >= tl.load(piece_start + later)
            mask = tl.where(begun, tl.load(piece_base + later), mask)
            eligible = tl.where(begun, tl.load(piece_eligible + later), eligible)
            allowed = tl.where(begun, tl.load(piece_special + later), allowed)
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
