"""What the commands share: a progress bar on stderr, children that end with us, results printed and kept."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["ERROR", "RESULTS", "keep", "leave_on_sigterm", "progress_bar", "publish"]

ERROR = Console(stderr=True, highlight=False, soft_wrap=True)
RESULTS = Path(__file__).with_name("results")


def leave_on_sigterm() -> None:
    """A child that is stopped would outlive us: on SIGTERM, leave by the way that ends it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def progress_bar() -> Progress:
    """A bar of turns; its tasks carry the field `detail`, what is going on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[detail]}"), console=ERROR)


def publish(results: dict[str, Any], out: Path | None) -> None:
    """Print the results as JSON, and keep them in `out` where that is a file."""
    print(json.dumps(results, indent=1))
    if out is not None:
        keep(results, out)


def keep(results: dict[str, Any], out: Path) -> None:
    """Keep the results, or those of a long run so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
