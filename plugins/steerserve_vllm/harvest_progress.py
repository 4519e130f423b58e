"""The progress bar of a harvest: how much of the input is done, tokens per second, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["Report", "progress_bar"]


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
    columns = (
        TextColumn("harvest"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("harvest", total=total, detail="")
        tokens = 0

        def show(report: Report) -> None:
            nonlocal tokens
            tokens += report.tokens
            speed = f"{report.speed:,.0f} tokens/s" if report.ran else "stored already"
            bar.update(task, completed=report.read, detail=f"{tokens:,} tokens, {speed}")

        yield show
