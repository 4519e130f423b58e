"""A principal's scopes and limits, checked against what is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, isnan

from steerserve.catalog import Catalog
from steerserve.errors import ForbiddenError
from steerserve.row import Row

from .principal import Principal

__all__ = ["check_limits", "check_may_steer", "check_scope"]

_AT = ("steering", "interventions")
_MOST_SHOWN = 8


def check_scope(principal: Principal, scope: str, what: str) -> None:
    """Refuse a principal without this scope.

    Args: what: what it is needed for, as in ``expected … for WHAT``.
    Raises: ForbiddenError.
    """
    if scope not in principal.scopes:
        has = ", ".join(sorted(principal.scopes)) or "none"
        message = f"expected a key with scope `{scope}` for {what}, got `{principal.name}` with {has}"
        raise ForbiddenError(message, at=(), reason="scope")


def check_may_steer(principal: Principal) -> None:
    """Refuse a principal that may not send `steering` at all.

    Raises: ForbiddenError.
    """
    check_scope(principal, "steer", "`steering` in a request")


def check_limits(principal: Principal, rows: Sequence[Row], catalog: Catalog) -> None:
    """Hold a request's own rows, without those of policies, to the limits of its key.

    Raises: ForbiddenError naming the key, the limit and the interventions beyond it.
    """
    limits = principal.limits
    if limits.max_interventions is not None and len(rows) > limits.max_interventions:
        _forbid(principal, "max_interventions", str(limits.max_interventions), [f"{len(rows)} interventions"])
    if limits.sources is not None:
        beyond = [_show(row, catalog) for row in rows if not _names(row, catalog) <= set(limits.sources)]
        _forbid(principal, "saes", ", ".join(limits.sources) or "none", beyond)
    if limits.ops is not None:
        beyond = [_show(row, catalog) for row in rows if row.op not in limits.ops]
        _forbid(principal, "ops", ", ".join(limits.ops) or "none", beyond)
    if limits.features is not None:
        beyond = [_show(row, catalog) for row in rows if not _in_ranges(row, limits.features, catalog)]
        _forbid(principal, "features", _say(limits.features), beyond)
    if limits.max_value is not None:
        beyond = [
            f"{_show(row, catalog)} to {_largest(row):g}"
            for row in rows
            if not _largest(row) <= limits.max_value
        ]
        _forbid(principal, "max_value", f"{limits.max_value:g}", beyond)


def _forbid(principal: Principal, limit: str, allowed: str, beyond: Sequence[str]) -> None:
    if beyond:
        shown = ", ".join(beyond[:_MOST_SHOWN]) + (", …" if len(beyond) > _MOST_SHOWN else "")
        message = f"expected what `{limit}` of key `{principal.name}` allows ({allowed[:256]}), got {shown}"
        raise ForbiddenError(message, at=_AT, reason="limit")


def _read(row: Row, catalog: Catalog) -> Iterator[tuple[str, int]]:
    """(source, feature) of what a row changes and of what its conditions read.

    A condition counts: with the report it tells where a feature is active.
    """
    for key, feature in ((row.source, row.feature), *((gate.source, gate.feature) for gate in row.gates)):
        source = catalog.sources[key]
        yield source.name if source.is_sae else source.key, feature


def _names(row: Row, catalog: Catalog) -> set[str]:
    return {name for name, _ in _read(row, catalog)}


def _in_ranges(row: Row, ranges: dict[str, tuple[tuple[int, int], ...]], catalog: Catalog) -> bool:
    """Whether each feature lies in a range of its SAE; `features` says nothing of other sources."""
    return all(
        name not in ranges or any(start <= feature < stop for start, stop in ranges[name])
        for name, feature in _read(row, catalog)
    )


def _largest(row: Row) -> float:
    """The largest |value| that a row writes, raw units, or its factor; nan where one is nan."""
    values = [row.c, *(bound for bound in (row.lo, row.hi) if bound not in (-inf, inf))]
    if row.op == "scale":
        values.append(row.a)
    sizes = [abs(value) for value in values]
    return next(filter(isnan, sizes), max(sizes))


def _show(row: Row, catalog: Catalog) -> str:
    (name, feature), *read = dict.fromkeys(_read(row, catalog))
    said = f"{row.op} {name}" + ("" if not catalog.sources[row.source].is_sae else f"[{feature}]")
    return said + "".join(f" when {other}[{index}]" for other, index in read)


def _say(features: dict[str, tuple[tuple[int, int], ...]]) -> str:
    return (
        ", ".join(f"{name}[{start}:{stop}]" for name, ranges in features.items() for start, stop in ranges)
        or "none"
    )
