"""A steering request, compiled: what to change, where, and the digest that names it.

A plan is frozen, independent of the prompt, and small: ids and numbers, never vectors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import inf
from typing import Any, Literal

from .catalog import Catalog, Source
from .errors import RequestError
from .spec import Condition, Intervention, SteeringSpec, Where
from .window import Selector, Window, resolve

__all__ = [
    "MAX_BITS",
    "Bits",
    "Effect",
    "Gate",
    "Origin",
    "Plan",
    "Row",
    "build_plan",
    "check_rows",
    "compile_observation",
    "compile_plan",
    "compile_row",
    "reading_places",
]


# A token's mask of windows has 64 bits.
MAX_BITS = 64

Effect = Literal["edit", "force", "hold", "observe", "abort"]


@dataclass(frozen=True)
class Gate:
    """The row applies only where `above` < f < `below` for this feature of this source, at its hook point."""

    source: str
    feature: int
    above: float
    below: float
    point: int

    @property
    def wire(self) -> list[Any]:
        """As plain strings and numbers."""
        return [self.source, self.feature, self.above, self.below, self.point]


@dataclass(frozen=True)
class Origin:
    """Who asked for a row: an entry of the request, or of a policy. No part of what a plan is."""

    index: int
    policy: str = ""
    watch: str = ""


@dataclass(frozen=True)
class Row:
    """One feature's change: f' = min(max(a·f + c, lo), hi), inside `window`, where every gate holds.

    `effect` says what becomes of f': "edit" applies it for the request; "force" applies it for a policy;
    "hold" applies it for a policy and keeps f at or under it in what the hook point passes on, whatever other
    rows do; "observe" counts it and changes nothing; "abort" ends the request where the gates hold. With
    `latch` the row applies from the first position on at which the gates held.
    """

    point: int
    source: str
    feature: int
    op: str
    a: float
    c: float
    lo: float
    hi: float
    gates: tuple[Gate, ...]
    window: Window
    effect: Effect = "edit"
    latch: bool = False
    origin: Origin = field(default=Origin(0), compare=False)

    @cached_property
    def wire(self) -> list[Any]:
        """As plain lists and numbers."""
        gates = [gate.wire for gate in self.gates]
        edit = [self.a, self.c, self.lo, self.hi]
        head = [self.point, self.source, self.feature, self.op, *edit, gates, self.window.wire]
        return [*head, self.effect, self.latch]

    @cached_property
    def text(self) -> bytes:
        """What a digest takes of the row."""
        return json.dumps(self.wire).encode()

    @property
    def earlier(self) -> tuple[Gate, ...]:
        """The gates at hook points before the row's own."""
        return tuple(gate for gate in self.gates if gate.point != self.point)

    @property
    def applies(self) -> bool:
        """Whether the row changes the stream."""
        return self.effect in ("edit", "force", "hold")

    @property
    def is_stateful(self) -> bool:
        """Whether what happens at a position depends on positions before it."""
        return self.latch or self.effect == "abort"


@dataclass(frozen=True)
class Bits:
    """Which bit of a token's mask says what of each row.

    `windows` [B]: bit b of a token's mask is set where `windows[b]` includes it. `row` [R]: the bit under
    which each row is listed. `condition` [R]: the bit that is cleared on the way where a gate at an earlier
    hook point does not hold; the same as `row`, but for rows that stay once they are latched.
    """

    windows: tuple[Window, ...]
    row: tuple[int, ...]
    condition: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Bits:
        """Rows of one window share a bit, unless an earlier hook point has a say in it."""
        windows: list[Window] = []
        shared: dict[Window, int] = {}

        def own(window: Window) -> int:
            windows.append(window)
            return len(windows) - 1

        def listed(row: Row) -> int:
            if row.window not in shared:
                shared[row.window] = own(row.window)
            return shared[row.window]

        conditions = [own(row.window) if row.earlier else listed(row) for row in rows]
        under = [listed(row) if row.latch else bit for row, bit in zip(rows, conditions, strict=True)]
        return cls(tuple(windows), tuple(under), tuple(conditions))


@dataclass(frozen=True)
class Plan:
    """The rows of one request in canonical order; equal plans have equal digests.

    With `drop`, tokens that a row of the request selects get the reconstruction of the edited features
    (`error: "drop"`) instead of x plus the change.
    """

    rows: tuple[Row, ...]
    digest: str
    drop: bool = False

    @cached_property
    def wire(self) -> list[Any]:
        """As plain lists and numbers, for `SamplingParams.extra_args`."""
        return [self.digest, [row.wire for row in self.rows], self.drop]

    @classmethod
    def from_wire(cls, wire: Sequence[Any]) -> Plan:
        """The inverse of `wire`."""
        digest, rows, drop = wire
        return cls(tuple(_row_from_wire(row) for row in rows), digest, drop)

    @cached_property
    def bits(self) -> Bits:
        """Which bits of a token's mask mean which rows."""
        return Bits.of(self.rows)

    @cached_property
    def may_abort(self) -> bool:
        """Whether a row may end the request: by its conditions, or because it could not be held."""
        return bool(self.ending)

    @cached_property
    def notes(self) -> bool:
        """Whether anything is noted of a request: a row latches, or may end it."""
        return self.may_abort or any(row.latch for row in self.rows)

    @cached_property
    def ending(self) -> list[int]:
        """The rows that may end the request."""
        return [number for number, row in enumerate(self.rows) if row.effect in ("abort", "hold")]

    @cached_property
    def needs_history(self) -> bool:
        """Whether a prefix must be computed to know what happened in it, so that no cache may be read.

        The last token of a prompt is computed in any case, and generation begins there.
        """
        return any(row.is_stateful and row.window.phase != "generation" for row in self.rows)

    def selector(self, prompt_len: int) -> Selector:
        """The plan's windows, one for each bit, resolved for a prompt of `prompt_len` tokens."""
        return _resolved(self.bits.windows, prompt_len)


# Most plans share their windows: the engine core and the worker meet them again with every request.
_resolved = lru_cache(maxsize=64)(resolve)


def compile_plan(spec: SteeringSpec, catalog: Catalog) -> Plan:
    """Resolve every name and number of a request against what is served.

    Raises: RequestError naming the field that cannot be honoured exactly.
    """
    if len(spec.interventions) > catalog.max_interventions:
        message = f"expected at most {catalog.max_interventions} interventions, got {len(spec.interventions)}"
        raise RequestError(message, at=("steering", "interventions"), reason="too_many")
    rows: list[Row] = []
    places: dict[tuple[str, int], int] = {}
    for index, intervention in enumerate(spec.interventions):
        at = ("steering", "interventions", index)
        row = compile_row(intervention, catalog, at, Origin(index))
        first = places.setdefault((row.source, row.feature), index) if row.applies else index
        if first != index:
            message = f"expected each feature once, got the one of interventions[{first}] again"
            raise RequestError(message, at=at, reason="duplicate")
        rows.append(row)
    check_rows(rows, catalog, catalog.features_per_request)
    drop = spec.error == "drop"
    if drop:
        _check_drop(rows, catalog)
    return build_plan(rows, catalog, drop)


def build_plan(rows: Iterable[Row], catalog: Catalog, drop: bool = False) -> Plan:
    """Rows that were checked, put in order and named by their digest."""
    ordered = tuple(sorted(rows, key=_order))
    return Plan(ordered, _digest(ordered, drop, catalog), drop)


def compile_row(intervention: Intervention, catalog: Catalog, at: Sequence[str | int], origin: Origin) -> Row:
    """One intervention, resolved. Args: at: its place in the request or document.

    Raises: RequestError naming the field that cannot be honoured exactly.
    """
    window = Window.of(intervention.where)
    _check_special(window, catalog, (*at, "where", "tokens"))
    if intervention.then == "abort":
        gates = _ordered(_gate(c, None, catalog, (*at, "when")) for c in intervention.conditions)
        last = max(gates, key=lambda gate: gate.point)
        place = (last.point, last.source, last.feature)
        return Row(*place, "abort", *_UNCHANGED, gates, window, "abort", origin=origin)
    if intervention.direction is not None:
        source = catalog.direction(intervention.direction, at)
        feature = 0
    else:
        assert intervention.feature is not None
        source = catalog.sae(intervention.sae, at)
        feature = source.feature(intervention.feature, (*at, "feature"))
    value = intervention.value or 0.0
    if intervention.unit == "max":
        value *= _maximum(source, feature, (*at, "unit"))
    assert intervention.op is not None
    edit = _EDITS[intervention.op](value)
    found = [_gate(c, source, catalog, (*at, "when")) for c in intervention.conditions]
    if intervention.only_if_active:
        found.append(Gate(source.key, feature, 0.0, inf, source.point.index))
    place = (source.point.index, source.key, feature)
    gates = _ordered(found)
    return Row(*place, intervention.op, *edit, gates, window, latch=intervention.latch, origin=origin)


def compile_observation(
    place: tuple[Source, int], above: float, where: Where, when: Iterable[Condition], catalog: Catalog,
    at: Sequence[str | int], origin: Origin,
) -> Row:  # fmt: skip
    """A row that only measures: its f' is the bound, so that tokens with f' < f are those above it.

    Raises: RequestError naming the field that cannot be honoured exactly.
    """
    source, feature = place
    window = Window.of(where)
    _check_special(window, catalog, (*at, "where", "tokens"))
    gates = _ordered(_gate(c, source, catalog, (*at, "when")) for c in when)
    edit = _EDITS["clamp"](above)
    spot = (source.point.index, source.key, feature)
    return Row(*spot, "watch", *edit, gates, window, "observe", origin=origin)


def _ordered(gates: Iterable[Gate]) -> tuple[Gate, ...]:
    return tuple(
        sorted(gates, key=lambda gate: (gate.point, gate.source, gate.feature, gate.above, gate.below))
    )


def _order(row: Row) -> tuple[Any, ...]:
    return row.point, row.source, row.feature, row.effect, row.text


def _maximum(source: Source, feature: int, at: Sequence[str | int]) -> float:
    known = source.max_activation(feature)
    if known is None:
        message = f'expected `unit` "raw": `{source.name}` has no recorded maximum activations'
        raise RequestError(message, at=at, reason="unsupported")
    return known


# op → (a, c, lo, hi) of f' = min(max(a·f + c, lo), hi)
_EDITS: dict[str, Callable[[float], tuple[float, float, float, float]]] = {
    "clamp": lambda v: (0.0, v, -inf, inf),
    "ablate": lambda v: (0.0, 0.0, -inf, inf),
    "scale": lambda v: (v, 0.0, -inf, inf),
    "add": lambda v: (1.0, v, -inf, inf),
    "at_least": lambda v: (1.0, 0.0, v, inf),
    "at_most": lambda v: (1.0, 0.0, -inf, v),
}


_UNCHANGED = (1.0, 0.0, -inf, inf)


def _gate(condition: Condition, own: Source | None, catalog: Catalog, at: Sequence[str | int]) -> Gate:
    by_default = own is not None and own.is_sae and condition.sae is None
    source = own if by_default and own is not None else catalog.sae(condition.sae, at)
    if own is not None and source.point > own.point:
        message = (
            f"expected a condition at the hook point of what it gates, {own.point.name}, or before it, "
            f"got one at {source.point.name}"
        )
        raise RequestError(message, at=at, reason="unsupported")
    feature = source.feature(condition.feature, (*at, "feature"))
    above = -inf if condition.above is None else condition.above
    below = inf if condition.below is None else condition.below
    return Gate(source.key, feature, above, below, source.point.index)


def _check_special(window: Window, catalog: Catalog, at: Sequence[str | int]) -> None:
    special = sorted(set(window.tokens) & catalog.special_tokens)
    if special and not window.special_tokens:
        message = f"expected `special_tokens: true` beside the special token {special[0]}"
        raise RequestError(message, at=at, reason="malformed")


def check_rows(rows: Sequence[Row], catalog: Catalog, limit: int) -> None:
    """Refuse rows that do not fit in a slot, or whose weights cannot be read.

    Args: limit: how many features they may read at one hook point.
    Raises: RequestError.
    """
    at = ("steering", "interventions")
    if catalog.stages > 1 and any(row.earlier for row in rows):
        message = "expected conditions at the hook point of what they gate: pipeline stages share no others"
        raise RequestError(message, at=at, reason="unsupported")
    if len(Bits.of(rows).windows) > MAX_BITS:
        message = f"expected at most {MAX_BITS} different windows, got {len(Bits.of(rows).windows)}"
        raise RequestError(message, at=at, reason="too_many")
    for read in reading_places(rows).values():
        if len(read) > limit:
            message = f"expected at most {limit} features read at one hook point, got {len(read)}"
            raise RequestError(message, at=at, reason="too_many")
    features: dict[str, set[int]] = {}
    for row in rows:
        for key, feature in ((row.source, row.feature), *((g.source, g.feature) for g in row.gates)):
            features.setdefault(key, set()).add(feature)
    for key, found in features.items():
        catalog.sources[key].check_rows(sorted(found), at)


def reading_places(rows: Sequence[Row]) -> dict[int, list[tuple[str, int]]]:
    """What a slot holds at each hook point, as (source, feature) in order.

    Every row; every question that a row at a later hook point asks there; features that only conditions read.
    """
    points = sorted({row.point for row in rows} | {gate.point for row in rows for gate in row.gates})
    return {point: _places(rows, point) for point in points}


def _places(rows: Sequence[Row], point: int) -> list[tuple[str, int]]:
    own = [(row.source, row.feature) for row in rows if row.point == point]
    asked = [[gate for gate in row.earlier if gate.point == point] for row in rows]
    own += [(gates[0].source, gates[0].feature) for gates in asked if gates]
    gates = [(g.source, g.feature) for row in rows for g in row.gates if g.point == point]
    return own + [place for place in dict.fromkeys(gates) if place not in set(own)]


def _check_drop(rows: Sequence[Row], catalog: Catalog) -> None:
    """One SAE at each hook point, whole on the device: whose reconstruction replaces x must be certain."""
    at = ("steering", "error")
    saes = [catalog.sources[key] for key in dict.fromkeys(row.source for row in rows)]
    saes = [source for source in saes if source.is_sae]
    if not saes:
        message = 'expected an intervention on the SAE whose reconstruction `error` "drop" asks for'
        raise RequestError(message, at=at, reason="unsupported")
    for source in saes:
        if not source.resident:
            message = (
                f'expected `error` "keep": "drop" needs the whole SAE `{source.name}` on the device, '
                "which the server's configuration does not ask for (`resident: true`)"
            )
            raise RequestError(message, at=at, reason="unsupported")
    points = [source.point for source in saes]
    if len(set(points)) < len(points):
        message = 'expected `error` "keep": "drop" with two SAEs at one hook point has two reconstructions'
        raise RequestError(message, at=at, reason="unsupported")


def _digest(rows: Sequence[Row], drop: bool, catalog: Catalog) -> str:
    keys = {row.source for row in rows} | {gate.source for row in rows for gate in row.gates}
    digest = hashlib.blake2b(b"drop" if drop else b"keep", digest_size=16)
    for row in rows:
        digest.update(row.text)
    digest.update(json.dumps([[key, catalog.sources[key].fingerprint] for key in sorted(keys)]).encode())
    return digest.hexdigest()


def _row_from_wire(wire: Sequence[Any]) -> Row:
    point, source, feature, op, a, c, lo, hi, gates, window, effect, latch = wire
    own = tuple(Gate(*gate) for gate in gates)
    return Row(point, source, feature, op, a, c, lo, hi, own, Window.from_wire(window), effect, latch)
