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
from .crossing import sent

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
        """Fill a slot with the plan's rows at this hook point, read from the memory-mapped weights.

        They are laid out on the host and sent in one copy that nobody waits for.

        Raises: CheckpointError if the weights cannot be read; the slot is then as it was.
        """
        entries = _entries(plan, point)
        places = reading_places(plan.rows).get(point, [])
        contents: dict[str, NDArray[Any]] = {}
        if places:
            contents = _weights(places, entries, catalog) | _edits(places, entries)
        dropped = _dropped(plan, point, catalog)
        residents = _residents(places, dropped, catalog)
        if places:
            contents["resident"] = np.array(residents, dtype=np.int32)
            contents["feature"] = np.array([feature for _, feature in places], dtype=np.int64)
            self._place(slot, len(places), sent(contents, self.count.device))
        self.count[slot].fill_(len(places))
        self.drop[slot].fill_(dropped)
        self._mark(slot, self.dense, self.dense_slots, dropped >= 0 or any(at >= 0 for at in residents))
        stateful = any(entry.state != PLAIN for entry in entries)
        self._mark(slot, self.stateful, self.stateful_slots, stateful)
        self._mark(slot, self.held, self.held_slots, any(entry.mode == HOLD for entry in entries))

    def _place(self, slot: int, used: int, contents: dict[str, Tensor]) -> None:
        for name, part in contents.items():
            own = getattr(self, name)[slot, :used]
            (own[:, :used] if name in ("above", "below") else own).copy_(part)

    def _mark(self, slot: int, mark: Tensor, slots: set[int], holds: bool) -> None:
        mark[slot].fill_(holds)
        (slots.add if holds else slots.discard)(slot)


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


def _weights(
    places: Sequence[tuple[str, int]], entries: Sequence[_Entry], catalog: Catalog
) -> dict[str, NDArray[Any]]:
    """Encoder and decoder rows [n, d], and their params [n, 12] but for the edits."""
    n, width = len(places), catalog.d_model
    encoder, decoder, params = torch.empty(n, width), torch.empty(n, width), torch.zeros(n, PARAMS)
    for source in dict.fromkeys(key for key, _ in places):
        at = torch.tensor([index for index, (key, _) in enumerate(places) if key == source])
        rows = catalog.sources[source].rows([feature for key, feature in places if key == source])
        encoder[at], decoder[at] = rows.encoder, rows.decoder
        activation = (rows.bias, rows.threshold, rows.scale, rows.shift, rows.floor)
        params[at, :A] = torch.stack(activation, dim=1)
    edits = [(entry.plan_row.a, entry.plan_row.c, entry.plan_row.lo, entry.plan_row.hi) for entry in entries]
    params[:, A:CEILING] = torch.tensor([*edits, *[_UNCHANGED] * (n - len(edits))])
    held = torch.tensor([k for k, entry in enumerate(entries) if entry.mode == HOLD], dtype=torch.int64)
    params[held, CEILING], params[held, BASE] = z_bounds(params[held])
    params[held, NORM] = encoder[held].square().sum(dim=1)
    return {"encoder": encoder.numpy(), "decoder": decoder.numpy(), "params": params.numpy()}


# The edit of a row that only conditions read.
_UNCHANGED = (1.0, 0.0, -np.inf, np.inf)


def _edits(places: Sequence[tuple[str, int]], entries: Sequence[_Entry]) -> dict[str, NDArray[Any]]:
    """What the rows are for and when they apply: everything of them that is not in `params`."""
    used = len(places)
    place = {key: index for index, key in reversed(list(enumerate(places)))}
    numbers = np.tile(np.array([-1, -1, OBSERVE, PLAIN, -1], dtype=np.int32), (used, 1))
    gated = np.zeros(used, dtype=np.bool_)
    above = np.full((used, used), -np.inf, dtype=np.float32)
    below = np.full((used, used), np.inf, dtype=np.float32)
    for i, entry in enumerate(entries):
        gated[i] = bool(entry.gates)
        numbers[i] = (entry.bit, entry.row, entry.mode, entry.state, entry.condition)
        for gate in entry.gates:
            j = place[gate.source, gate.feature]
            above[i, j], below[i, j] = max(above[i, j], gate.above), min(below[i, j], gate.below)
    columns = zip(("bit", "row", "mode", "state", "condition"), numbers.T, strict=True)
    return {"gated": gated, "above": above, "below": below} | dict(columns)


def _residents(places: Sequence[tuple[str, int]], dropped: int, catalog: Catalog) -> list[int]:
    """Which resident gives each place's activation; −1 where the formula does."""
    # A reconstruction and the rows edited in it read the same f, to the last bit at a threshold.
    name = catalog.residents[dropped].key if dropped >= 0 else ""
    return [dropped if source == name else catalog.resident_of(source) for source, _ in places]


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
