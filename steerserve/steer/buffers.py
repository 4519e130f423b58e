"""Fixed buffers with changing contents: the rows of every slot at one hook point."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..catalog import Catalog
from ..plan import Plan, Row

__all__ = ["PointBuffers"]

# Columns of `params`: the activation, then the edit.
BIAS, THRESHOLD, SCALE, SHIFT, FLOOR, A, C, LO, HI = range(9)


class PointBuffers:
    """What the op reads at one hook point, S slots of up to K rows each, d the stream's width.

    encoder, decoder [S, K, d]; params [S, K, 9]; above, below [S, K, K]: row i applies where
    above[i, j] < f_j < below[i, j] for all j; bit [S, K]: a row's bit in the token's mask, −1 for a row that
    only conditions read; count [S]: rows in use; gated [S, K]: whether a row
    has a condition. Pages that no plan ever filled are never touched, so they cost no memory.
    """

    def __init__(self, slots: int, rows: int, width: int, device: torch.device | str = "cpu") -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.encoder = empty(slots, rows, width)
        self.decoder = empty(slots, rows, width)
        self.params = empty(slots, rows, 9)
        self.above = empty(slots, rows, rows)
        self.below = empty(slots, rows, rows)
        self.bit = empty(slots, rows, dtype=torch.int32)
        self.count = torch.zeros(slots, dtype=torch.int32, device=device)
        self.gated = torch.zeros(slots, rows, dtype=torch.bool, device=device)

    @cached_property
    def views(self) -> tuple[NDArray[Any], ...]:
        """The arrays that the CPU kernel takes, in its order; they share the buffers' memory."""
        matrices = (self.encoder, self.decoder, self.params, self.above, self.below)
        return tuple(part.numpy() for part in (*matrices, self.bit, self.count, self.gated))

    def write(self, slot: int, plan: Plan, point: int, catalog: Catalog) -> None:
        """Fill a slot with the plan's rows at this hook point, read from the memory-mapped weights."""
        rows = [(bit, row) for bit, row in enumerate(plan.rows) if row.point == point]
        self.count[slot] = 0
        if not rows:
            return
        order = _reading_order([row for _, row in rows])
        place = {key: index for index, key in enumerate(order)}
        for source in dict.fromkeys(key[0] for key in order):
            features = [feature for key, feature in order if key == source]
            at = torch.tensor([place[source, feature] for feature in features])
            weights = catalog.sources[source].rows(features)
            self.encoder[slot].index_copy_(0, at, weights.encoder.to(self.encoder.device))
            self.decoder[slot].index_copy_(0, at, weights.decoder.to(self.decoder.device))
            activation = (weights.bias, weights.threshold, weights.scale, weights.shift, weights.floor)
            self.params[slot, :, :A].index_copy_(0, at, torch.stack(activation, dim=1).to(self.params.device))
        used = len(order)
        self._write_edits(slot, rows, used, place)
        self.count[slot] = used

    def _write_edits(
        self, slot: int, rows: Sequence[tuple[int, Row]], used: int, place: dict[tuple[str, int], int]
    ) -> None:
        edits = np.tile(np.array([1.0, 0.0, -np.inf, np.inf], dtype=np.float32), (used, 1))
        bits = np.full(used, -1, dtype=np.int32)
        gated = np.zeros(used, dtype=np.bool_)
        above = np.full((used, used), -np.inf, dtype=np.float32)
        below = np.full((used, used), np.inf, dtype=np.float32)
        for bit, row in rows:
            i = place[row.source, row.feature]
            bits[i], gated[i], edits[i] = bit, bool(row.gates), (row.a, row.c, row.lo, row.hi)
            for gate in row.gates:
                j = place[gate.source, gate.feature]
                above[i, j], below[i, j] = max(above[i, j], gate.above), min(below[i, j], gate.below)
        self.params[slot, :used, A:] = torch.from_numpy(edits)
        self.bit[slot, :used] = torch.from_numpy(bits)
        self.gated[slot, :used] = torch.from_numpy(gated)
        self.above[slot, :used, :used] = torch.from_numpy(above)
        self.below[slot, :used, :used] = torch.from_numpy(below)


def _reading_order(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Every feature that is read: those that are edited first, then those that only conditions read."""
    edited = [(row.source, row.feature) for row in rows]
    gates = [(gate.source, gate.feature) for row in rows for gate in row.gates]
    return list(dict.fromkeys([*edited, *gates]))
