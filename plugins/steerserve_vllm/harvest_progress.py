"""The progress bar of a harvest: how much of the input is done, tokens per second, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["Report", "progress_bar", "progress_bars"]


class Report(NamedTuple):
    """What is done after a batch.

    Attributes:
        read: how much of the input: bytes of a corpus, or prompts.
        tokens: of this batch. speed: tokens per second since the first that was run.
        ran: False for a batch that the harvest that is resumed had already.
    """

    read: int
    tokens: int
    speed: float
    ran: bool


@contextmanager
def progress_bar(total: int | None) -> Iterator[Callable[[Report], None]]:
    """A bar on stderr. Args: total: all of the input, in the unit of `Report.read`; None if not known."""
    with progress_bars(["harvest"], total) as show:
        yield lambda report: show(0, report)


@contextmanager
def progress_bars(names: Sequence[str], total: int | None) -> Iterator[Callable[[int, Report], None]]:
    """A bar for each name; gives what is told of which a report is, by number. Args: total: of each."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = [bar.add_task(name, total=total, detail="") for name in names]
        tokens = [0] * len(names)

        def show(number: int, report: Report) -> None:
            tokens[number] += report.tokens
            speed = f"{report.speed:,.0f} tokens/s" if report.ran else "stored already"
            bar.update(tasks[number], completed=report.read, detail=f"{tokens[number]:,} tokens, {speed}")

        yield show
