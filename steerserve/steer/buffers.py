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
    only conditions read; count [S]: rows in use; gated [S, K]: whether a row has a condition.

    For what needs a whole encoder (`steer_dense`): resident [S, K], which of the catalog's residents gives
    the row's activation, −1 where the formula does; feature [S, K], its index there; drop [S], the resident
    whose reconstruction replaces x, −1 to keep the error; dense [S], whether any of these is set.

    On the CPU, pages that no plan ever filled are never touched, so they cost no memory.
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
        self.resident = torch.full((slots, rows), -1, dtype=torch.int32, device=device)
        self.feature = torch.zeros(slots, rows, dtype=torch.int64, device=device)
        self.drop = torch.full((slots,), -1, dtype=torch.int32, device=device)
        self.dense = torch.zeros(slots, dtype=torch.bool, device=device)
        self.dense_slots: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Size of the buffers in bytes."""
        return sum(part.nbytes for part in vars(self).values() if isinstance(part, Tensor))

    @cached_property
    def views(self) -> tuple[NDArray[Any], ...]:
        """The arrays that the CPU kernel takes, in its order; they share the buffers' memory."""
        matrices = (self.encoder, self.decoder, self.params, self.above, self.below)
        return tuple(part.numpy() for part in (*matrices, self.bit, self.count, self.gated))

    def write(self, slot: int, plan: Plan, point: int, catalog: Catalog) -> None:
        """Fill a slot with the plan's rows at this hook point, read from the memory-mapped weights."""
        rows = [(bit, row) for bit, row in enumerate(plan.rows) if row.point == point]
        self.count[slot] = 0
        self._write_dense(slot, [], plan, point, catalog)
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
        self._write_dense(slot, order, plan, point, catalog)
        self.count[slot] = used

    def _write_dense(
        self, slot: int, order: Sequence[tuple[str, int]], plan: Plan, point: int, catalog: Catalog
    ) -> None:
        dropped = _dropped(plan, point, catalog)
        # A reconstruction and the rows edited in it read the same f, to the last bit at a threshold.
        name = catalog.residents[dropped].key if dropped >= 0 else ""
        places = [dropped if source == name else catalog.resident_of(source) for source, _ in order]
        self.drop[slot] = dropped
        self.resident[slot] = -1
        if places:
            self.resident[slot, : len(order)] = torch.tensor(places, dtype=torch.int32)
            self.feature[slot, : len(order)] = torch.tensor([feature for _, feature in order])
        dense = dropped >= 0 or any(place >= 0 for place in places)
        self.dense[slot] = dense
        (self.dense_slots.add if dense else self.dense_slots.discard)(slot)

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


def _dropped(plan: Plan, point: int, catalog: Catalog) -> int:
    """Which resident's reconstruction replaces x at this hook point; −1 to keep the error."""
    if not plan.drop:
        return -1
    named = (catalog.sources[row.source] for row in plan.rows if row.point == point)
    return next((catalog.residents.index(source) for source in named if source.is_sae), -1)


def _reading_order(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Every feature that is read: those that are edited first, then those that only conditions read."""
    edited = [(row.source, row.feature) for row in rows]
    gates = [(gate.source, gate.feature) for row in rows for gate in row.gates]
    return list(dict.fromkeys([*edited, *gates]))
