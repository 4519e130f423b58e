"""The report of a request that was carried to admission, whoever asks for it."""

from __future__ import annotations

from typing import Any

from steerserve.carried import Carried
from steerserve.policy.outcome import policy_entries
from steerserve.report import Reporter, TicketTally

__all__ = ["report_of"]


def report_of(carried: Carried, reporter: Reporter, tally: TicketTally | None) -> dict[str, Any] | None:
    """What a reply says of its steering; None where no report is wanted, or nothing was admitted.

    Args: tally: what the workers counted; None if they did not answer in time.
    """
    if carried.spec is None or not carried.wants_report or carried.merged.plan is None:
        return None
    return reporter.report(
        carried.spec,
        carried.merged.plan,
        tally,
        admitted=carried.admitted,
        unmatched=carried.unmatched,
        policies=policy_entries(carried.merged, tally),
    )
