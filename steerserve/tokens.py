"""The token map of a step: for each token in the batch, its plan's slot and the rows that apply to it.

Rebuilt every step from where each request stands; nothing is remembered between steps, so chunked prompts,
preemption and resumption cannot change what a request means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from .window import Selector

__all__ = ["Batch", "TokenMap"]

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """The selectors of a batch's requests, laid end to end; made anew only when the batch changes.

    slot [R] int32, −1 for requests without a plan; the rest are the selectors' arrays with [R + 1] offsets.
    """

    slot: Int32
    piece_at: Int64
    piece_start: Int64
    piece_base: Int64
    piece_eligible: Int64
    piece_special: Int64
    named_at: Int64
    named_id: Int64
    named_include: Int64
    named_exclude: Int64

    @classmethod
    def of(cls, slots: Sequence[int], selectors: Sequence[Selector | None]) -> Batch:
        """Lay out the requests of a batch, in the batch's order."""
        present = [selector for selector in selectors if selector is not None]

        def laid(name: str) -> Int64:
            parts = [getattr(selector, name) for selector in present]
            return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

        def offsets(name: str) -> Int64:
            sizes = [0 if selector is None else len(getattr(selector, name)) for selector in selectors]
            return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)

        return cls(
            slot=np.array(slots, dtype=np.int32),
            piece_at=offsets("starts"),
            piece_start=laid("starts"),
            piece_base=laid("base"),
            piece_eligible=laid("eligible"),
            piece_special=laid("special_ok"),
            named_at=offsets("token_ids"),
            named_id=laid("token_ids"),
            named_include=laid("token_include"),
            named_exclude=laid("token_exclude"),
        )


class TokenMap:
    """Fixed arrays of the steered tokens of one step; the first `count` entries are valid.

    index [T] int64, their place in the batch; slot [T] int32; rows [T] int64 masks; owner [T] int32, the
    request's place in the batch; position [T] int64, in the request's own sequence.

    Args: special: [vocab] which token ids are special.
    """

    def __init__(self, max_tokens: int, special: NDArray[np.bool_]) -> None:
        self.index = torch.zeros(max_tokens, dtype=torch.int64)
        self.slot = torch.full((max_tokens,), -1, dtype=torch.int32)
        self.rows = torch.zeros(max_tokens, dtype=torch.int64)
        self.index_view, self.slot_view, self.rows_view = (
            self.index.numpy(),
            self.slot.numpy(),
            self.rows.numpy(),
        )
        self.owner = np.zeros(max_tokens, dtype=np.int32)
        self.position = np.zeros(max_tokens, dtype=np.int64)
        self.special = special
        self.count = 0

    def fill(self, batch: Batch, scheduled: Int32, computed: Int32, token_ids: Int32) -> int:
        """Map the tokens of a step.

        Args:
            scheduled: [R] tokens of each request in this step, which stand one after another.
            computed: [R] tokens of each request before this step.
            token_ids: [≥ sum of scheduled] int32 ids.
        Returns: how many tokens are steered.
        """
        self.count = _fill(
            batch.slot,
            batch.piece_at,
            batch.piece_start,
            batch.piece_base,
            batch.piece_eligible,
            batch.piece_special,
            batch.named_at,
            batch.named_id,
            batch.named_include,
            batch.named_exclude,
            scheduled,
            computed,
            token_ids,
            self.special,
            self.index_view,
            self.slot_view,
            self.rows_view,
            self.owner,
            self.position,
        )
        return self.count

    def clear(self) -> None:
        """Steer nothing: what a warm-up or an idle step must see."""
        self.count = 0


_I64 = "int64[::1]"
_SIGNATURE = (
    f"int64(int32[::1], {', '.join([_I64] * 9)}, int32[::1], int32[::1], int32[:], boolean[::1], "
    f"{_I64}, int32[::1], {_I64}, int32[::1], {_I64})"
)


@numba.njit(_SIGNATURE, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _fill(
    slot: Any,
    piece_at: Any,
    piece_start: Any,
    piece_base: Any,
    piece_eligible: Any,
    piece_special: Any,
    named_at: Any,
    named_id: Any,
    named_include: Any,
    named_exclude: Any,
    scheduled: Any,
    computed: Any,
    token_ids: Any,
    special: Any,
    out_index: Any,
    out_slot: Any,
    out_rows: Any,
    out_owner: Any,
    out_position: Any,
) -> int:
    found = 0
    first = 0
    for r in range(slot.shape[0]):
        n = scheduled[r]
        if slot[r] >= 0:
            piece, last = piece_at[r], piece_at[r + 1] - 1
            for i in range(n):
                position = computed[r] + i
                while piece < last and piece_start[piece + 1] <= position:
                    piece += 1
                token = token_ids[first + i]
                mask = piece_base[piece]
                for k in range(named_at[r], named_at[r + 1]):
                    if named_id[k] == token:
                        mask = (mask | (named_include[k] & piece_eligible[piece])) & ~named_exclude[k]
                if 0 <= token < special.shape[0] and special[token]:
                    mask &= piece_special[piece]
                if mask != 0:
                    out_index[found] = first + i
                    out_slot[found] = slot[r]
                    out_rows[found] = mask
                    out_owner[found] = r
                    out_position[found] = position
                    found += 1
        first += n
    return found
