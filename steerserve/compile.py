"""From a spec, or an entry of a policy, to rows: every name and number resolved against what is served."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from math import inf

from .catalog import Catalog, Source
from .errors import RequestError
from .layout import MAX_BITS, Bits, reading_places
from .plan import Plan, build_plan
from .reach import meeting
from .row import Gate, Origin, Row
from .spec import MAX_VALUE, Condition, Intervention, SteeringSpec, Where
from .unmatched import check_where
from .window import Window

__all__ = ["check_apart", "check_rows", "compile_observation", "compile_plan", "compile_row"]


def compile_plan(spec: SteeringSpec, catalog: Catalog) -> Plan:
    """Resolve every name and number of a request against what is served.

    Raises: RequestError naming the field that cannot be honoured exactly.
    """
    if len(spec.interventions) > catalog.max_interventions:
        message = f"expected at most {catalog.max_interventions} interventions, got {len(spec.interventions)}"
        raise RequestError(message, at=("steering", "interventions"), reason="too_many")
    root = ("steering", "interventions")
    rows = [
        compile_row(intervention, catalog, (*root, index), Origin(index))
        for index, intervention in enumerate(spec.interventions)
    ]
    check_apart(rows, catalog, root)
    check_rows(rows, catalog, catalog.features_per_request)
    drop = spec.error == "drop"
    if drop:
        _check_drop(rows, catalog)
    return build_plan(rows, catalog, drop)


def compile_row(intervention: Intervention, catalog: Catalog, at: Sequence[str | int], origin: Origin) -> Row:
    """One intervention, resolved. Args: at: its place in the request or document.

    Raises: RequestError naming the field that cannot be honoured exactly.
    """
    window = _window(intervention.where, catalog, (*at, "where"))
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
        value = _of_maximum(value, source, feature, at)
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
    window = _window(where, catalog, (*at, "where"))
    gates = _ordered(_gate(c, source, catalog, (*at, "when")) for c in when)
    edit = _EDITS["clamp"](above)
    spot = (source.point.index, source.key, feature)
    return Row(*spot, "watch", *edit, gates, window, "observe", origin=origin)


def _ordered(gates: Iterable[Gate]) -> tuple[Gate, ...]:
    return tuple(
        sorted(gates, key=lambda gate: (gate.point, gate.source, gate.feature, gate.above, gate.below))
    )


def _of_maximum(value: float, source: Source, feature: int, at: Sequence[str | int]) -> float:
    """Multiples of a feature's recorded maximum, in raw units, where a value has its bounds."""
    known = source.max_activation(feature)
    if known is None:
        message = f'expected `unit` "raw": `{source.name}` has no recorded maximum activations, got "max"'
        raise RequestError(message, at=(*at, "unit"), reason="unsupported")
    if not 0 < known < inf:
        message = (
            f'expected `unit` "raw": the recorded maximum activation of this feature is {known:g}, of which '
            'there are no multiples, got "max"'
        )
        raise RequestError(message, at=(*at, "unit"), reason="unsupported")
    raw = value * known
    if not -MAX_VALUE <= raw <= MAX_VALUE:
        message = (
            f"expected `value` from {-MAX_VALUE / known:g} to {MAX_VALUE / known:g}, so that times the "
            f"feature's recorded maximum of {known:g} it lies within ±{MAX_VALUE:g} raw units, got {value:g}"
        )
        raise RequestError(message, at=(*at, "value"), reason="out_of_range")
    return raw


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


def _window(where: Where, catalog: Catalog, at: Sequence[str | int]) -> Window:
    window = Window.of(where)
    special = sorted(set(window.tokens) & catalog.special_tokens)
    if special and not window.special_tokens:
        message = f"expected `special_tokens: true` beside the special token {special[0]}"
        raise RequestError(message, at=(*at, "tokens"), reason="malformed")
    check_where(where, catalog, at)
    return window


def check_apart(rows: Sequence[Row], catalog: Catalog, root: Sequence[str | int]) -> None:
    """Refuse rows that would change one feature at one token.

    Args: root: where their entries stand; `row.origin.index` is their place in it.
    Raises: RequestError naming the later of two.
    """
    changes: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.applies:
            changes.setdefault((row.source, row.feature), []).append(row)
    for of_one in changes.values():
        # More rows that are apart than a token's mask has bits are refused for that.
        for first, second in combinations(of_one[: MAX_BITS + 1], 2):
            _check_pair(first, second, catalog, root)


def _check_pair(first: Row, second: Row, catalog: Catalog, root: Sequence[str | int]) -> None:
    place = meeting(first.window, second.window, catalog.special_tokens, catalog.max_len)
    if place is None:
        return
    message = (
        f"expected each feature once at each token, got the one of interventions[{first.origin.index}] "
        f"again: both change it at {place}"
    )
    if {first.window.phase, second.window.phase} == {"prompt", "generation"}:
        message += ', which is in both phases (`stop: -1` leaves it out of "prompt")'
    raise RequestError(message, at=(*root, second.origin.index), reason="duplicate")


def check_rows(rows: Sequence[Row], catalog: Catalog, limit: int) -> None:
    """Refuse rows that do not fit in a slot, or whose weights cannot be read.

    Args: limit: how many features they may read at one hook point.
    Raises: RequestError.
    """
    at = ("steering", "interventions")
    if catalog.stages > 1 and any(row.earlier for row in rows):
        message = "expected conditions at the hook point of what they gate: pipeline stages share no others"
        raise RequestError(message, at=at, reason="unsupported")
    if catalog.stages > 1 and any(row.effect in ("abort", "hold") for row in rows):
        message = "expected nothing that may end a request: the engine hears the last pipeline stage alone"
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
