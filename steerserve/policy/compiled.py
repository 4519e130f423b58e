"""A policy's rows: its interventions and watches, resolved against what is served."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product

from steerserve.catalog import Catalog, Source
from steerserve.compile import check_apart, check_rows, compile_observation, compile_row
from steerserve.errors import PolicyError, RequestError
from steerserve.reach import Place, meeting
from steerserve.row import Effect, Origin, Row
from steerserve.sae import Sae

from .document import Policy, Watch

__all__ = ["CompiledPolicy", "check_policies", "compile_policies", "distinct"]

# What a ceiling is kept on: anything else that is enforced is applied, as a request's own would be.
_CEILINGS = ("ablate", "at_most")


@dataclass(frozen=True)
class CompiledPolicy:
    """A policy and its rows; of a shadow policy all of them only observe."""

    policy: Policy
    rows: tuple[Row, ...]

    @cached_property
    def applied(self) -> dict[tuple[str, int], list[Row]]:
        """The rows that change the stream, by what they change: several, where their windows are apart."""
        found: dict[tuple[str, int], list[Row]] = {}
        for row in self.rows:
            if row.applies:
                found.setdefault((row.source, row.feature), []).append(row)
        return found


def check_policies(
    policies: Sequence[Policy], catalog: Catalog, routes: Collection[str] | None = None
) -> dict[str, CompiledPolicy]:
    """Refuse a set that cannot be enforced exactly, as a whole.

    Args: routes: the routes that generate, where they are known: a policy for another one would hold nothing.
    Returns: as `compile_policies`.
    Raises: PolicyError naming the policy and what is wrong.
    """
    compiled = compile_policies(policies, catalog)
    for policy in policies if routes is not None else ():
        for route in policy.applies.routes:
            if routes is not None and route not in routes:
                known = ", ".join(sorted(routes))
                raise PolicyError(f"policy `{policy.name}`: expected routes of {known}, got {route!r}")
    return compiled


def compile_policies(policies: Sequence[Policy], catalog: Catalog) -> dict[str, CompiledPolicy]:
    """Every policy that is not off, by name.

    Raises: PolicyError if one names what is not served or what cannot be held, if two change the same
        feature in different ways, or if all of them together do not fit beside a request's own rows.
    """
    found = {p.name: CompiledPolicy(p, tuple(_rows(p, catalog))) for p in policies if p.mode != "off"}
    _check_agreement(found, catalog)
    rows = distinct(row for one in found.values() for row in one.rows)
    try:
        check_rows(rows, catalog, catalog.policy_rows)
    except RequestError as error:
        raise PolicyError(f"all policies together: {error}") from None
    return found


def distinct(rows: Iterable[Row]) -> list[Row]:
    """What policies agree on is applied once; what they watch is counted for each."""
    found: dict[object, Row] = {}
    for row in rows:
        found.setdefault(row if row.applies else (row, row.origin), row)
    return list(found.values())


def _rows(policy: Policy, catalog: Catalog) -> Iterable[Row]:
    try:
        asked = [
            compile_row(intervention, catalog, ("interventions", index), Origin(index, policy.name))
            for index, intervention in enumerate(policy.interventions)
        ]
        check_apart(asked, catalog, ("interventions",))
        for index, row in enumerate(asked):
            yield _as_enforced(row, policy, catalog, ("interventions", index))
        for index, watch in enumerate(policy.watch):
            origin = Origin(index, policy.name, watch.name)
            yield _observed(watch, catalog, ("watch", index), origin)
    except RequestError as error:
        raise PolicyError(f"policy `{policy.name}`: {error}") from None


def _as_enforced(row: Row, policy: Policy, catalog: Catalog, at: Sequence[str | int]) -> Row:
    if policy.mode == "shadow":
        return replace(row, effect="observe")
    if row.effect == "abort":
        return row
    if row.op in _CEILINGS:
        _check_holdable(catalog.sources[row.source], row, at)
    effect: Effect = "hold" if row.op in _CEILINGS else "force"
    return replace(row, effect=effect)


def _observed(watch: Watch, catalog: Catalog, at: Sequence[str | int], origin: Origin) -> Row:
    if watch.direction is not None:
        place = catalog.direction(watch.direction, at), 0
    else:
        assert watch.feature is not None
        source = catalog.sae(watch.sae, at)
        place = source, source.feature(watch.feature, (*at, "feature"))
    return compile_observation(place, watch.above, watch.where, watch.conditions, catalog, at, origin)


def _check_holdable(source: Source, row: Row, at: Sequence[str | int]) -> None:
    """A ceiling is a half-space of the stream, so the feature must have an encoder row of its own there."""
    sae = source.body
    if row.latch:
        message = f'expected no `latch` beside an enforced `{row.op}`: hold it always, or say `then: "abort"`'
        raise RequestError(message, at=(*at, "latch"), reason="unsupported")
    if isinstance(sae, Sae) and (sae.normalisation != "none" or sae.encoder is not None):
        message = (
            f"expected a feature with a linear encoder, for only that can be held: `{source.name}` is "
            f"{sae.architecture}, normalised by {sae.normalisation}"
        )
        raise RequestError(message, at=at, reason="unsupported")
    if not source.rows([row.feature]).encoder.any():
        message = f"expected a feature that reads the stream: the encoder row of {row.feature} is all zeros"
        raise RequestError(message, at=at, reason="unsupported")


def _check_agreement(policies: Mapping[str, CompiledPolicy], catalog: Catalog) -> None:
    for first, second in combinations(policies.values(), 2):
        for source, feature in first.applied.keys() & second.applied.keys():
            pairs = product(first.applied[source, feature], second.applied[source, feature])
            met = (_met(*pair, catalog) for pair in pairs)
            if (place := next(filter(None, met), None)) is not None:
                raise PolicyError(
                    f"policy `{second.policy.name}`: expected a feature that no other policy changes, or "
                    f"changes in just this way or at other tokens: `{first.policy.name}` changes {source} "
                    f"{feature} otherwise at {place}"
                )


def _met(first: Row, second: Row, catalog: Catalog) -> Place | None:
    """Where two policies would change one feature, each in its way."""
    if first == second:
        return None
    return meeting(first.window, second.window, catalog.special_tokens, catalog.max_len)
