"""The log that a training run leaves beside its SAE."""

from __future__ import annotations

import json
import math
from pathlib import Path

__all__ = ["TRAINING_LOG", "read_log"]

TRAINING_LOG = "training.jsonl"


def read_log(path: Path) -> list[dict[str, float]]:
    """The finite numbers of each line that has a `step`; empty where there is no log.

    Lines that are not JSON are left out: a crash may have cut one off.
    """
    if not path.is_file():
        return []
    rows = (_row(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if "step" in row]


def _row(line: str) -> dict[str, float]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(row, dict):
        return {}
    numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float)}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}
