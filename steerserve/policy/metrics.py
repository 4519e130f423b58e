"""What an operator watches of the policies: how many are in force, and whether new ones were refused."""

from __future__ import annotations

from collections import Counter as Tally
from typing import get_args

from prometheus_client import Counter, Gauge

from .document import Mode
from .policy_set import PolicySet

__all__ = ["count_failed_reload", "show_policies"]

_policies = Gauge("steerserve_policies", "Policies by mode.", ["mode"], multiprocess_mode="mostrecent")
_failures = Counter(
    "steerserve_policy_reload_failures",
    "Contents of the policy folder that were refused; the last good set stays.",
)


def show_policies(policies: PolicySet) -> None:
    """This set is the one in force now."""
    modes = Tally(policy.mode for policy in policies.policies.values())
    for mode in get_args(Mode):
        _policies.labels(mode=mode).set(modes[mode])


def count_failed_reload() -> None:
    """The folder holds what cannot be enforced."""
    _failures.inc()
