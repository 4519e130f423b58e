"""What the policies did to a request: for its report, the audit log and the metrics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from steerserve.report import Counts, TicketTally
from steerserve.row import Row

from .compiled import CompiledPolicy
from .document import Policy
from .enforcement import Merged

__all__ = ["aborted", "policy_entries", "tokens_touched", "watched"]


def policy_entries(merged: Merged, tally: TicketTally | None) -> list[dict[str, Any]]:
    """One entry for each policy that applied, as a report shows it."""
    return [_entry(one, merged, tally) for one in merged.compiled]


def watched(merged: Merged, tally: TicketTally | None) -> Iterator[tuple[Policy, Row, Counts]]:
    """Every watch of the policies that applied, with what it saw."""
    by_name = {policy.name: policy for policy in merged.policies}
    for row, counts in _counted(merged, tally):
        if row.origin.watch and row.origin.policy in by_name:
            yield by_name[row.origin.policy], row, counts


def aborted(merged: Merged, tally: TicketTally | None) -> bool:
    """Whether a condition, or a row that could not be held, ended a request."""
    return any(
        row.effect in ("abort", "hold") and counts.since >= 0 for row, counts in _counted(merged, tally)
    )


def tokens_touched(merged: Merged, tally: TicketTally | None) -> int:
    """Of the feature that was changed most, at how many tokens it was."""
    return _most_changed((row, counts) for row, counts in _counted(merged, tally) if row.applies)


def _most_changed(counted: Iterable[tuple[Row, Counts]]) -> int:
    """Rows of one feature are apart: no token is counted by two of them."""
    tokens: Counter[tuple[str, int]] = Counter()
    for row, counts in counted:
        tokens[row.source, row.feature] += counts.tokens
    return max(tokens.values(), default=0)


def _counted(merged: Merged, tally: TicketTally | None) -> Iterator[tuple[Row, Counts]]:
    rows = merged.plan.rows if merged.plan is not None else ()
    found = tally.rows if tally is not None else {}
    return ((row, found.get(number, Counts())) for number, row in enumerate(rows))


def _entry(one: CompiledPolicy, merged: Merged, tally: TicketTally | None) -> dict[str, Any]:
    # What several policies agree on is one row of the plan, and what each of them did.
    own = [
        (row, counts)
        for row, counts in _counted(merged, tally)
        if row.origin.policy == one.policy.name
        or (row.origin.policy and row.applies and row in one.applied.get((row.source, row.feature), ()))
    ]
    policy = one.policy
    entry: dict[str, Any] = {"name": policy.name, "version": policy.version, "mode": policy.mode}
    entry["tokens"] = _most_changed((row, counts) for row, counts in own if not row.origin.watch)
    ends = [counts.since for row, counts in own if row.effect in ("abort", "hold") and counts.since >= 0]
    if ends:
        entry["aborted_at"] = min(ends)
    watches = [_watch(row, counts) for row, counts in own if row.origin.watch]
    return entry | ({"watch": watches} if watches else {})


def _watch(row: Row, counts: Counts) -> dict[str, Any]:
    largest = counts.max_before if math.isfinite(counts.max_before) else None
    seen = {"tokens": counts.tokens, "fired": counts.fired, "above": counts.lowered}
    return {"name": row.origin.watch, **seen, "max": largest}
