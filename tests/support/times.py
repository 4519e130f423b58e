"""Where the time goes: a table of files, their seconds, and what starting engines and servers took of them.

A plugin of pytest, also under pytest-xdist, whose processes send it in their reports.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

__all__ = ["starting"]

LINES = 30
_starts: list[float] = []
_files: dict[str, Counter[str]] = {}


@contextmanager
def starting() -> Iterator[None]:
    """Count what is done inside as one start of an engine or a server, for the test that runs now."""
    begun = time.monotonic()
    yield
    _starts.append(time.monotonic() - begun)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Hand the starts over with the report of the phase in which they were made."""
    report = yield
    report.starts = _starts.copy()
    _starts.clear()
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a phase of a test to its file."""
    counts = _files.setdefault(report.nodeid.split("::")[0], Counter())
    starts = getattr(report, "starts", [])
    counts.update(
        tests=report.when == "call", seconds=report.duration, starts=len(starts), starting=sum(starts)
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the files that took longest, and the sum."""
    longest = sorted(_files.items(), key=lambda pair: pair[1]["seconds"], reverse=True)
    if not longest:
        return
    whole: Counter[str] = Counter()
    for counts in _files.values():
        whole.update(counts)
    rest: Counter[str] = Counter()
    for _, counts in longest[LINES:]:
        rest.update(counts)
    rows = [*longest[:LINES], (f"{len(longest[LINES:])} more files", rest), ("sum", whole)]
    terminalreporter.section("where the time went")
    terminalreporter.line(f"{'seconds':>8} {'tests':>6} {'starts':>6} {'of s':>7}  file")
    for name, row in rows:
        starts = f"{row['starts']:6d} {row['starting']:7.1f}" if row["starts"] else " " * 14
        terminalreporter.line(f"{row['seconds']:8.1f} {row['tests']:6d} {starts}  {name}")
