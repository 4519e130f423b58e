"""What stands in an audit log that was verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steerserve.audit import verify

__all__ = ["verified"]


def verified(folder: Path) -> list[dict[str, Any]]:
    """Every record, after the chain was found sound. A half line at the end is what a crash leaves."""
    verdict = verify(folder)
    assert verdict.ok, verdict.fault
    lines = [
        line for path in sorted(folder.glob("audit-*.jsonl")) for line in path.read_bytes().split(b"\n")[:-1]
    ]
    return [json.loads(line) for line in lines]
