"""The proof that steering happened: what the workers counted, merged, in the order of the request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .catalog import Catalog, Source
from .errors import json_path
from .plan import Plan
from .spec import Intervention, SteeringSpec

__all__ = ["Collected", "Counts", "Reporter", "TicketTally", "is_incomplete", "merge_workers"]

# A row's number in its plan.
RowKey = int
_NONE: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True)
class Counts:
    """What one row of a plan did: tokens, and f before and f' after over them (raw units).

    `fired` are tokens with f > 0, `lowered` those with f' < f. `since` is where the row latched, ended the
    request, or could not be held; −1 if it did not, the first of several requests.
    """

    tokens: int = 0
    from_cache: int = 0
    sum_before: float = 0.0
    max_before: float = -math.inf
    sum_after: float = 0.0
    max_after: float = -math.inf
    fired: int = 0
    lowered: int = 0
    since: int = -1

    @classmethod
    def of(cls, wire: Sequence[Any]) -> Counts:
        """From a worker's numbers (see `Tally.wire`)."""
        cached, since, tokens, sum_before, max_before, sum_after, max_after, fired, lowered = wire
        sums = (sum_before, max_before, sum_after, max_after)
        return cls(int(tokens), cached, *sums, int(fired), int(lowered), since)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.tokens + other.tokens,
            self.from_cache + other.from_cache,
            self.sum_before + other.sum_before,
            max(self.max_before, other.max_before),
            self.sum_after + other.sum_after,
            max(self.max_after, other.max_after),
            self.fired + other.fired,
            self.lowered + other.lowered,
            min((at for at in (self.since, other.since) if at >= 0), default=-1),
        )


@dataclass(frozen=True)
class TicketTally:
    """All engine requests of one HTTP request: how many there were, and the counts of each row.

    `is_exact` says that they are the counts of what the client received: false where the engine had run too
    far behind a request's end to tell.
    """

    requests: int = 0
    rows: dict[RowKey, Counts] = field(default_factory=dict)
    is_exact: bool = True


@dataclass(frozen=True)
class Collected:
    """One answer of the whole engine.

    `tokens` are steered tokens since the engine started, by (source, op).
    """

    tallies: dict[str, TicketTally] = field(default_factory=dict)
    tokens: dict[tuple[str, str], int] = field(default_factory=dict)
    slots_in_use: int = 0
    slots_capacity: int = 0


def merge_workers(replies: Iterable[Mapping[str, Any]]) -> Collected:
    """One answer from every worker's.

    Tensor-parallel ranks count the same tokens and pipeline stages each their own layers, so within one
    data-parallel replica the rank that saw most of a row is right about it; replicas serve different requests
    and are summed.

    Args: replies: what `steerserve_collect` returned on each worker; empty where a worker steers nothing.
    """
    replicas: dict[int, list[Mapping[str, Any]]] = {}
    for reply in replies:
        if reply:
            replicas.setdefault(reply.get("dp_rank", 0), []).append(reply)
    merged = [_merge_ranks(ranks) for ranks in replicas.values()]
    tallies: dict[str, TicketTally] = {}
    tokens: dict[tuple[str, str], int] = {}
    for part in merged:
        for ticket, tally in part.tallies.items():
            tallies[ticket] = _sum_tallies(tallies.get(ticket), tally)
        for key, count in part.tokens.items():
            tokens[key] = tokens.get(key, 0) + count
    in_use = sum(part.slots_in_use for part in merged)
    return Collected(tallies, tokens, in_use, sum(part.slots_capacity for part in merged))


def _merge_ranks(ranks: Sequence[Mapping[str, Any]]) -> Collected:
    """The ranks of one replica: for each number, the rank that knows most of it."""
    rows: dict[str, dict[RowKey, Counts]] = {}
    requests: dict[str, int] = {}
    tokens: dict[tuple[str, str], int] = {}
    inexact = {ticket for rank in ranks for ticket in rank["inexact"]}
    for rank in ranks:
        for ticket, wire in rank["tallies"].items():
            best = rows.setdefault(ticket, {})
            for key, counts in _sum_rows(wire).items():
                if key not in best or _weight(counts) > _weight(best[key]):
                    best[key] = counts
        for ticket, count in rank["requests"].items():
            requests[ticket] = max(requests.get(ticket, 0), count)
        for source, op, count in rank["tokens"]:
            tokens[source, op] = max(tokens.get((source, op), 0), count)
    tallies = {
        ticket: TicketTally(requests.get(ticket, 0), found, ticket not in inexact)
        for ticket, found in rows.items()
    }
    slots = [rank["slots"] for rank in ranks]
    in_use = max(slot["in_use"] for slot in slots)
    return Collected(tallies, tokens, in_use, max(slot["capacity"] for slot in slots))


def _weight(counts: Counts) -> tuple[int, int]:
    """How much a rank knows of a row."""
    return counts.tokens, counts.since


def _sum_rows(requests: Iterable[Sequence[Sequence[Any]]]) -> dict[RowKey, Counts]:
    """A ticket's rows on one rank: its engine requests have the same plan, and so the same rows."""
    rows: dict[RowKey, Counts] = {}
    for request in requests:
        for key, numbers in enumerate(request):
            rows[key] = rows.get(key, Counts()) + Counts.of(numbers)
    return rows


def _sum_tallies(first: TicketTally | None, second: TicketTally) -> TicketTally:
    if first is None:
        return second
    keys = first.rows.keys() | second.rows.keys()
    rows = {key: first.rows.get(key, Counts()) + second.rows.get(key, Counts()) for key in keys}
    return TicketTally(first.requests + second.requests, rows, first.is_exact and second.is_exact)


class Reporter:
    """Writes reports about what one catalog serves."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._labels = {key: _first_labels(source) for key, source in catalog.sources.items()}

    def report(
        self,
        spec: SteeringSpec,
        plan: Plan,
        tally: TicketTally | None,
        *,
        admitted: int = 1,
        unmatched: Mapping[int, int] = _NONE,
        policies: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        """The `steering` object of a reply.

        Args:
            tally: what the workers counted; None if they did not answer in time.
            admitted: engine requests that took the plan, which the tally must not fall short of.
            unmatched: by intervention, how many of these its window cannot match.
            policies: what the policies that applied did.
        Returns: plain JSON values; `incomplete` is there, and true, only where counts are missing, or are
            not those of the reply alone; `warnings` only where a window matched nothing.
        """
        found = tally or TicketTally()
        own = {row.origin.index: number for number, row in enumerate(plan.rows) if not row.origin.policy}
        counted = [found.rows.get(own[index], Counts()) for index in range(len(spec.interventions))]
        entries = [
            self._entry(intervention, counts)
            for intervention, counts in zip(spec.interventions, counted, strict=True)
        ]
        body: dict[str, Any] = {"digest": plan.digest, "policies": list(policies), "interventions": entries}
        body["requests"] = found.requests
        if is_incomplete(tally, admitted):
            body["incomplete"] = True
        warnings = list(_warnings(spec, counted, unmatched, found.requests, admitted))
        return body | ({"warnings": warnings} if warnings else {})

    def _entry(self, intervention: Intervention, counts: Counts) -> dict[str, Any]:
        if intervention.then == "abort":
            return {"then": "abort", "aborted_at": None if counts.since < 0 else counts.since}
        entry = {**self._named(intervention), "op": intervention.op}
        if intervention.latch:
            entry["latched_at"] = None if counts.since < 0 else counts.since
        return entry | {
            "tokens": counts.tokens,
            "tokens_from_cache": counts.from_cache,
            "before": _summary(counts.tokens, counts.sum_before, counts.max_before),
            "after": _summary(counts.tokens, counts.sum_after, counts.max_after),
        }

    def _named(self, intervention: Intervention) -> dict[str, Any]:
        source, feature = self._resolve(intervention)
        if not source.is_sae:
            return {"direction": source.name}
        label = intervention.feature if isinstance(intervention.feature, str) else None
        label = label or self._labels[source.key].get(feature)
        return {"sae": source.name, "feature": feature} | ({"label": label} if label else {})

    def _resolve(self, intervention: Intervention) -> tuple[Source, int]:
        if intervention.direction is not None:
            return self._catalog.direction(intervention.direction, ()), 0
        source = self._catalog.sae(intervention.sae, ())
        return source, source.feature(intervention.feature or 0, ())


def is_incomplete(tally: TicketTally | None, admitted: int) -> bool:
    """Whether counts are missing, or are not those of the reply alone. Args: as `Reporter.report`."""
    return tally is None or tally.requests < admitted or not tally.is_exact


def _warnings(
    spec: SteeringSpec, counted: Sequence[Counts], unmatched: Mapping[int, int], requests: int, admitted: int
) -> Iterator[str]:
    """Windows that matched no token of this request, or of some of its prompts."""
    for index, (intervention, counts) in enumerate(zip(spec.interventions, counted, strict=True)):
        missed = unmatched.get(index, 0)
        waits = intervention.then == "abort" or intervention.conditions or intervention.only_if_active
        if not waits and requests >= admitted and counts.tokens + counts.from_cache == 0:
            missed = admitted
        if missed:
            of = "this request" if missed >= admitted else f"each of {admitted} prompts"
            got = "none" if missed >= admitted else f"none of {missed} of them"
            at = json_path(("steering", "interventions", index, "where"))
            yield f"expected a window that includes some token of {of}, got {got} - at {at}"


def _first_labels(source: Source) -> dict[int, str]:
    """Each labelled feature's first label."""
    labels: dict[int, str] = {}
    for label, features in source.labels.items():
        for feature in features:
            labels.setdefault(feature, label)
    return labels


def _summary(tokens: int, total: float, largest: float) -> dict[str, float] | None:
    if tokens == 0 or not (math.isfinite(total) and math.isfinite(largest)):
        return None
    return {"mean": total / tokens, "max": largest}
