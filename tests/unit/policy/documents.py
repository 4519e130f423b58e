"""Documents by example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from steerserve.policy import Policy


def document(name: str = "no-scam", **changed: Any) -> bytes:
    """A sound policy as YAML, with fields changed, or left out where they are None."""
    fields = {
        "name": name,
        "version": 1,
        "mode": "enforce",
        "owner": "safety@example.org",
        "reason": "Ticket 12: never help with scams.",
        "interventions": [{"feature": 5, "op": "ablate"}],
    } | changed
    text = yaml.safe_dump({key: value for key, value in fields.items() if value is not None}, sort_keys=False)
    return text.encode()


def accept(policies: Sequence[Policy]) -> None:
    """A check that finds nothing wrong."""
