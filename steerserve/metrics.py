"""What an operator watches: prometheus metrics on the default registry, which vLLM's own /metrics shows.

Labels are bounded: the operator names SAEs, directions, policies and watches, ops are few, reasons are the
slugs of errors.
"""

from __future__ import annotations

import math

from prometheus_client import Counter, Gauge, Histogram

from .plan import Plan
from .policy.enforcement import Merged
from .policy.outcome import watched
from .report import Collected, TicketTally

__all__ = [
    "TokenFeed",
    "admissions",
    "count_rejection",
    "observe_admission",
    "observe_report",
    "observe_slots",
    "observe_watches",
]

_MICROSECONDS_TO_10_MS = (5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2)
_MILLISECONDS_TO_5_S = (1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

_requests = Counter(
    "steerserve_requests", "Engine requests admitted with steering, by what they steer.", ["sae", "op"]
)
_tokens = Counter("steerserve_tokens", "Tokens steered, by SAE and op.", ["sae", "op"])
_rejections = Counter("steerserve_rejections", "Steering requests refused, by reason.", ["reason"])
_slots_in_use = Gauge(
    "steerserve_slots_in_use", "Distinct plans in the batch.", multiprocess_mode="mostrecent"
)
_slots_capacity = Gauge(
    "steerserve_slots_capacity", "Distinct plans that fit in a batch.", multiprocess_mode="mostrecent"
)
_admission_seconds = Histogram(
    "steerserve_admission_seconds", "Time to admit one steered request.", buckets=_MICROSECONDS_TO_10_MS
)
_report_seconds = Histogram(
    "steerserve_report_seconds", "Time a reply waited for its report.", buckets=_MILLISECONDS_TO_5_S
)
_WATCHED = ["policy", "watch"]
_watch_tokens = Counter("steerserve_watch_tokens", "Tokens that a watch looked at.", _WATCHED)
_watch_fired = Counter("steerserve_watch_fired_tokens", "Tokens on which a watch's feature fired.", _WATCHED)
_watch_above = Counter("steerserve_watch_above_tokens", "Tokens above a watch's bound.", _WATCHED)
_watch_largest = Histogram(
    "steerserve_watch_max_activation",
    "The largest activation of each request, raw units.",
    _WATCHED,
    buckets=(0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0),
)
_admitted = 0


def observe_admission(plan: Plan, seconds: float) -> None:
    """One engine request took this plan; admitting it took so long."""
    global _admitted
    _admitted += 1
    _admission_seconds.observe(seconds)
    for source, op in {(row.source, row.op) for row in plan.rows}:
        _requests.labels(sae=_name(source), op=op).inc()


def count_rejection(reason: str) -> None:
    """One request was refused; `reason` is the slug of its RequestError."""
    _rejections.labels(reason=reason).inc()


def observe_watches(merged: Merged, tally: TicketTally | None) -> None:
    """What the watches of policies saw of one request."""
    for policy, row, counts in watched(merged, tally):
        labels = {"policy": policy.name, "watch": row.origin.watch}
        _watch_tokens.labels(**labels).inc(counts.tokens)
        _watch_fired.labels(**labels).inc(counts.fired)
        _watch_above.labels(**labels).inc(counts.lowered)
        if math.isfinite(counts.max_before):
            _watch_largest.labels(**labels).observe(counts.max_before)


def observe_report(seconds: float) -> None:
    """One reply waited so long for its report."""
    _report_seconds.observe(seconds)


def observe_slots(collected: Collected) -> None:
    """Show the engine's slots."""
    _slots_in_use.set(collected.slots_in_use)
    _slots_capacity.set(collected.slots_capacity)


def admissions() -> int:
    """Engine requests admitted by this process so far; tells whether there can be anything new to show."""
    return _admitted


class TokenFeed:
    """Turns the engine's running totals into increments of the token counter.

    With several API servers one alone may feed it: all of them see the same totals, and prometheus adds up
    what the processes counted.
    """

    def __init__(self) -> None:
        self._shown: dict[tuple[str, str], int] = {}

    def update(self, collected: Collected) -> None:
        """Count what is new since the last call. Totals that fell are of an engine that started again."""
        for (source, op), total in collected.tokens.items():
            shown = self._shown.get((source, op), 0)
            self._shown[source, op] = total
            _tokens.labels(sae=_name(source), op=op).inc(total - shown if total >= shown else total)


def _name(source: str) -> str:
    """The label of a source: an SAE by its name alone, a direction as `direction:name`."""
    return source.removeprefix("sae:")
