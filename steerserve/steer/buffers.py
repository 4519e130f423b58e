"""Fixed buffers with changing contents: the rows of every slot at one hook point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..catalog import Catalog
from ..layout import reading_places
from ..plan import Plan
from ..row import Gate, Row

__all__ = ["BufferViews", "PointBuffers", "z_bounds"]

# Columns of `params`: the activation; the edit; and of rows
# that are held the largest pre-activation z allowed, the smallest (−∞ for all but directions), and ‖w‖².
BIAS, THRESHOLD, SCALE, SHIFT, FLOOR, A, C, LO, HI, CEILING, BASE, NORM = range(12)
PARAMS = NORM + 1
# What becomes of a row's f': it is counted alone; applied for the request; applied for a policy; applied for
# a policy, and kept as a ceiling of what the hook point passes on.
OBSERVE, EDIT, FORCE, HOLD = range(4)
# What a row remembers or tells: nothing; where it latched; where it ended the request; to rows at later hook
# points, whether their conditions here hold.
PLAIN, LATCH, ABORT, ASKED = range(4)

_MODES = {"edit": EDIT, "force": FORCE, "hold": HOLD, "observe": OBSERVE, "abort": OBSERVE}


class PointBuffers:
    """What the op reads at one hook point, S slots of up to K rows each, d the stream's width.

    encoder, decoder [S, K, d]; params [S, K, 12]; above, below [S, K, K]: row i applies where
    above[i, j] < f_j < below[i, j] for all j; bit [S, K]: the bit of the token's mask that lists a row, −1
    for a row that only conditions read; row [S, K]: its number in the plan, −1 where it has none; mode,
    state [S, K]: see the constants; condition [S, K]: the bit that says whether the conditions at earlier
    hook points hold; count [S]: rows in use; gated [S, K]: whether a row has a condition; stateful, held
    [S]: whether any row has a state, or is a ceiling.

    For what needs a whole encoder (`steer_dense`): resident [S, K], which of the catalog's residents gives
    the row's activation, −1 where the formula does; feature [S, K], its index there; drop [S], the resident
    whose reconstruction replaces x, −1 to keep the error; dense [S], whether any of these is set.

    On the CPU, pages that no plan ever filled are never touched, so they cost no memory.
    """

    def __init__(self, slots: int, rows: int, width: int, device: torch.device | str = "cpu") -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.encoder = empty(slots, rows, width)
        self.decoder = empty(slots, rows, width)
        self.params = empty(slots, rows, PARAMS)
        self.above = empty(slots, rows, rows)
        self.below = empty(slots, rows, rows)
        self.bit = empty(slots, rows, dtype=torch.int32)
        self.row = zeros(slots, rows, dtype=torch.int32)
        self.mode = torch.full((slots, rows), EDIT, dtype=torch.int32, device=device)
        self.state = zeros(slots, rows, dtype=torch.int32)
        self.condition = zeros(slots, rows, dtype=torch.int32)
        self.count = zeros(slots, dtype=torch.int32)
        self.gated = zeros(slots, rows, dtype=torch.bool)
        self.stateful = zeros(slots, dtype=torch.bool)
        self.held = zeros(slots, dtype=torch.bool)
        self.resident = torch.full((slots, rows), -1, dtype=torch.int32, device=device)
        self.feature = zeros(slots, rows, dtype=torch.int64)
        self.drop = torch.full((slots,), -1, dtype=torch.int32, device=device)
        self.dense = zeros(slots, dtype=torch.bool)
        self.dense_slots: set[int] = set()
        self.stateful_slots: set[int] = set()
        self.held_slots: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Size of the buffers in bytes."""
        return sum(part.nbytes for part in vars(self).values() if isinstance(part, Tensor))

    @cached_property
    def views(self) -> BufferViews:
        """The same memory as arrays, for the loops on the CPU."""
        parts = (getattr(self, name).numpy() for name in _VIEWED)
        return BufferViews(*parts)

    def write(self, slot: int, plan: Plan, point: int, catalog: Catalog) -> None:
        """Fill a slot with the plan's rows at this hook point, read from the memory-mapped weights."""
        self.count[slot] = 0
        for mark, slots in ((self.stateful, self.stateful_slots), (self.held, self.held_slots)):
            mark[slot] = False
            slots.discard(slot)
        self._write_dense(slot, [], plan, point, catalog)
        places = reading_places(plan.rows).get(point)
        if not places:
            return
        for source in dict.fromkeys(key for key, _ in places):
            at = torch.tensor([index for index, (key, _) in enumerate(places) if key == source])
            features = [feature for key, feature in places if key == source]
            weights = catalog.sources[source].rows(features)
            self.encoder[slot].index_copy_(0, at, weights.encoder.to(self.encoder.device))
            self.decoder[slot].index_copy_(0, at, weights.decoder.to(self.decoder.device))
            activation = (weights.bias, weights.threshold, weights.scale, weights.shift, weights.floor)
            self.params[slot, :, :A].index_copy_(0, at, torch.stack(activation, dim=1).to(self.params.device))
        entries = _entries(plan, point)
        self._write_edits(slot, entries, places)
        self._write_dense(slot, places, plan, point, catalog)
        self._write_ceilings(slot, entries)
        self._mark(slot, entries)
        self.count[slot] = len(places)

    def _write_ceilings(self, slot: int, entries: Sequence[_Entry]) -> None:
        held = [k for k, entry in enumerate(entries) if entry.mode == HOLD]
        if not held:
            return
        at = torch.tensor(held)
        rows = self.params[slot].index_select(0, at.to(self.params.device)).cpu()
        ceiling, base = z_bounds(rows)
        norm = self.encoder[slot].index_select(0, at.to(self.encoder.device)).cpu().square().sum(dim=1)
        bounds = torch.stack([ceiling, base, norm], dim=1).to(self.params.device)
        self.params[slot, :, CEILING:].index_copy_(0, at.to(self.params.device), bounds)

    def _mark(self, slot: int, entries: Sequence[_Entry]) -> None:
        if any(entry.state != PLAIN for entry in entries):
            self.stateful[slot] = True
            self.stateful_slots.add(slot)
        if any(entry.mode == HOLD for entry in entries):
            self.held[slot] = True
            self.held_slots.add(slot)

    def _write_dense(
        self, slot: int, places: Sequence[tuple[str, int]], plan: Plan, point: int, catalog: Catalog
    ) -> None:
        dropped = _dropped(plan, point, catalog)
        # A reconstruction and the rows edited in it read the same f, to the last bit at a threshold.
        name = catalog.residents[dropped].key if dropped >= 0 else ""
        residents = [dropped if source == name else catalog.resident_of(source) for source, _ in places]
        self.drop[slot] = dropped
        self.resident[slot] = -1
        if residents:
            self.resident[slot, : len(places)] = torch.tensor(residents, dtype=torch.int32)
            self.feature[slot, : len(places)] = torch.tensor([feature for _, feature in places])
        dense = dropped >= 0 or any(place >= 0 for place in residents)
        self.dense[slot] = dense
        (self.dense_slots.add if dense else self.dense_slots.discard)(slot)

    def _write_edits(self, slot: int, entries: Sequence[_Entry], places: Sequence[tuple[str, int]]) -> None:
        used = len(places)
        place = {key: index for index, key in reversed(list(enumerate(places)))}
        edits = np.tile(np.array([1.0, 0.0, -np.inf, np.inf], dtype=np.float32), (used, 1))
        numbers = np.tile(np.array([-1, -1, OBSERVE, PLAIN, -1], dtype=np.int32), (used, 1))
        gated = np.zeros(used, dtype=np.bool_)
        above = np.full((used, used), -np.inf, dtype=np.float32)
        below = np.full((used, used), np.inf, dtype=np.float32)
        for i, entry in enumerate(entries):
            row, gates = entry.plan_row, entry.gates
            gated[i], edits[i] = bool(gates), (row.a, row.c, row.lo, row.hi)
            numbers[i] = (entry.bit, entry.row, entry.mode, entry.state, entry.condition)
            for gate in gates:
                j = place[gate.source, gate.feature]
                above[i, j], below[i, j] = max(above[i, j], gate.above), min(below[i, j], gate.below)
        self.params[slot, :used, A:CEILING] = torch.from_numpy(edits)
        for part, column in zip(
            (self.bit, self.row, self.mode, self.state, self.condition), numbers.T, strict=True
        ):
            part[slot, :used] = torch.from_numpy(column.copy())
        self.gated[slot, :used] = torch.from_numpy(gated)
        self.above[slot, :used, :used] = torch.from_numpy(above)
        self.below[slot, :used, :used] = torch.from_numpy(below)


_VIEWED = (
    *("encoder", "decoder", "params", "above", "below"),
    *("bit", "row", "mode", "state", "condition", "count", "gated"),
)


class BufferViews(NamedTuple):
    """The arrays of a `PointBuffers` that the loops on the CPU read."""

    encoder: NDArray[Any]
    decoder: NDArray[Any]
    params: NDArray[Any]
    above: NDArray[Any]
    below: NDArray[Any]
    bit: NDArray[Any]
    row: NDArray[Any]
    mode: NDArray[Any]
    state: NDArray[Any]
    condition: NDArray[Any]
    used: NDArray[Any]
    gated: NDArray[Any]


@dataclass(frozen=True)
class _Entry:
    """One place of a slot that does something: a row of the plan, or what a later row asks here."""

    plan_row: Row
    gates: tuple[Gate, ...]
    bit: int
    row: int
    mode: int
    state: int
    condition: int


def z_bounds(params: Tensor) -> tuple[Tensor, Tensor]:
    """Between which pre-activations a held row's feature stays: f ≤ c for a clamp, f ≤ hi otherwise.

    Args: params: [n, 12]; the columns of the activation and the edit are read.
    Returns: z_max [n], and z_min [n]: −∞, but z_max for the identity of a direction that is clamped.
    """
    clamped = params[:, A] == 0
    limit = torch.where(clamped, params[:, C], params[:, HI])
    identity = params[:, FLOOR] == -torch.inf
    # A rectified feature never goes below 0, whatever is asked of it.
    limit = torch.where(identity, limit, limit.clamp(min=0))
    reached = (limit - params[:, SHIFT]) / params[:, SCALE]
    least = torch.maximum(params[:, SCALE] * params[:, THRESHOLD] + params[:, SHIFT], params[:, FLOOR])
    ceiling = torch.where(least > limit, params[:, THRESHOLD], reached)
    return ceiling, torch.where(identity & clamped, ceiling, -torch.inf)


def _entries(plan: Plan, point: int) -> list[_Entry]:
    """In the order of `reading_places`."""
    bits, found, asked = plan.bits, [], []
    for number, row in enumerate(plan.rows):
        listed, condition = bits.row[number], bits.condition[number]
        here = tuple(gate for gate in row.gates if gate.point == point)
        if row.point == point:
            state = LATCH if row.latch else ABORT if row.effect == "abort" else PLAIN
            found.append(_Entry(row, here, listed, number, _MODES[row.effect], state, condition))
        elif here:
            unchanged = replace(row, a=1.0, c=0.0, lo=-np.inf, hi=np.inf)
            asked.append(_Entry(unchanged, here, condition, -1, OBSERVE, ASKED, condition))
    return found + asked


def _dropped(plan: Plan, point: int, catalog: Catalog) -> int:
    """Which resident's reconstruction replaces x at this hook point; −1 to keep the error."""
    if not plan.drop:
        return -1
    own = (row for row in plan.rows if row.point == point and row.effect == "edit")
    named = (catalog.sources[row.source] for row in own)
    return next((catalog.residents.index(source) for source in named if source.is_sae), -1)
