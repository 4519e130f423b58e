"""A steering request, compiled: what to change, where, and the digest that names it.

A plan is frozen, independent of the prompt, and small: ids and numbers, never vectors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import inf
from typing import Any

from .catalog import Catalog, Source
from .errors import RequestError
from .spec import Condition, Intervention, SteeringSpec
from .window import Selector, Window, resolve

__all__ = ["Gate", "Plan", "Row", "compile_plan"]


@dataclass(frozen=True)
class Gate:
    """The row applies only where `above` < f < `below` for this feature of this source."""

    source: str
    feature: int
    above: float
    below: float


@dataclass(frozen=True)
class Row:
    """One feature's change: f' = min(max(a·f + c, lo), hi), inside `window`, where every gate holds."""

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

    @property
    def wire(self) -> list[Any]:
        """As plain lists and numbers."""
        gates = [[gate.source, gate.feature, gate.above, gate.below] for gate in self.gates]
        edit = [self.a, self.c, self.lo, self.hi]
        return [self.point, self.source, self.feature, self.op, *edit, gates, self.window.wire]


@dataclass(frozen=True)
class Plan:
    """The rows of one request in canonical order; equal plans have equal digests.

    Bit i of every row mask means `rows[i]`. With `drop`, tokens that a row selects get the reconstruction of
    the edited features (`error: "drop"`) instead of x plus the change.
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

    def selector(self, prompt_len: int) -> Selector:
        """The plan's windows, resolved for a prompt of `prompt_len` tokens."""
        return _resolved(tuple(row.window for row in self.rows), prompt_len)


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
        row = _compile_row(intervention, catalog, at)
        first = places.setdefault((row.source, row.feature), index)
        if first != index:
            message = f"expected each feature once, got the one of interventions[{first}] again"
            raise RequestError(message, at=at, reason="duplicate")
        rows.append(row)
    rows.sort(key=lambda row: (row.point, row.source, row.feature))
    _check_conditions_fit(rows, catalog)
    _check_rows(rows, catalog)
    drop = spec.error == "drop"
    if drop:
        _check_drop(rows, catalog)
    return Plan(tuple(rows), _digest(rows, drop, catalog), drop)


def _compile_row(intervention: Intervention, catalog: Catalog, at: Sequence[str | int]) -> Row:
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
    a, c, lo, hi = _EDITS[intervention.op](value)
    gates = [_gate(c, source, catalog, (*at, "when")) for c in intervention.conditions]
    if intervention.only_if_active:
        gates.append(Gate(source.key, feature, 0.0, inf))
    gates.sort(key=lambda gate: (gate.source, gate.feature, gate.above, gate.below))
    window = Window.of(intervention.where)
    _check_special(window, catalog, (*at, "where", "tokens"))
    return Row(source.point.index, source.key, feature, intervention.op, a, c, lo, hi, tuple(gates), window)


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


def _gate(condition: Condition, own: Source, catalog: Catalog, at: Sequence[str | int]) -> Gate:
    source = own if condition.sae is None and own.is_sae else catalog.sae(condition.sae, at)
    if source.point != own.point:
        message = (
            f"expected a condition at the hook point of what it gates, {own.point.name}, "
            f"got one at {source.point.name}"
        )
        raise RequestError(message, at=at, reason="unsupported")
    feature = source.feature(condition.feature, (*at, "feature"))
    above = -inf if condition.above is None else condition.above
    below = inf if condition.below is None else condition.below
    return Gate(source.key, feature, above, below)


def _check_special(window: Window, catalog: Catalog, at: Sequence[str | int]) -> None:
    special = sorted(set(window.tokens) & catalog.special_tokens)
    if special and not window.special_tokens:
        message = f"expected `special_tokens: true` beside the special token {special[0]}"
        raise RequestError(message, at=at, reason="malformed")


def _check_conditions_fit(rows: Sequence[Row], catalog: Catalog) -> None:
    for point in {row.point for row in rows}:
        here = [row for row in rows if row.point == point]
        read = {(row.source, row.feature) for row in here}
        read |= {(gate.source, gate.feature) for row in here for gate in row.gates}
        if len(read) > catalog.rows_per_point:
            message = (
                f"expected at most {catalog.rows_per_point} features read at one hook point, got {len(read)}"
            )
            raise RequestError(message, at=("steering", "interventions"), reason="too_many")


def _check_rows(rows: Sequence[Row], catalog: Catalog) -> None:
    by_source: dict[str, set[int]] = {}
    for row in rows:
        for key, feature in ((row.source, row.feature), *((g.source, g.feature) for g in row.gates)):
            by_source.setdefault(key, set()).add(feature)
    for key, features in by_source.items():
        catalog.sources[key].check_rows(sorted(features), ("steering", "interventions"))


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
    weights = [[key, catalog.sources[key].fingerprint] for key in sorted(keys)]
    text = json.dumps([[row.wire for row in rows], weights, drop])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _row_from_wire(wire: Sequence[Any]) -> Row:
    point, source, feature, op, a, c, lo, hi, gates, window = wire
    own = tuple(Gate(*gate) for gate in gates)
    return Row(point, source, feature, op, a, c, lo, hi, own, Window.from_wire(window))
