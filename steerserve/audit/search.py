"""Finding records again, in all chains of a folder. Checks nothing: `verify` does."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from steerserve.errors import AuditError, ConfigError

from .files import ChainFiles, chains_in
from .lines import Line, LinkedRecord, read_files
from .record import as_name

__all__ = ["Search", "search"]


@dataclass(frozen=True)
class Search:
    """What is looked for; None means any. `since` is the beginning of a time as the log writes it."""

    principal: str | None = None
    route: str | None = None
    policy: str | None = None
    outcome: str | None = None
    since: str | None = None

    def __post_init__(self) -> None:
        if self.since is not None and not re.fullmatch(r"\d{4}(-\d\d(-\d\d(T[\d:.]*Z?)?)?)?", self.since):
            raise ConfigError(
                f"expected a UTC time like 2026-01-31 or 2026-01-31T12:00 for `since`, got {self.since!r}"
            )

    def finds(self, record: LinkedRecord) -> bool:
        """Whether the record is looked for."""
        return (
            _is_among(self.principal, [record.principal])
            and _is_among(self.route, [record.route])
            and _is_among(self.outcome, [record.outcome])
            and _is_among(self.policy, [use.name for use in record.policies])
            and (self.since is None or record.time >= self.since)
        )


def search(folder: Path, wanted: Search) -> Iterator[Line]:
    """The lines that hold such a record, each chain's in its order, the chains put together by time.

    Raises: AuditError if the folder holds no log, or cannot be read.
    """
    try:
        chains = chains_in(folder)
        if not chains:
            raise AuditError(f"expected an audit log in {folder}, there is none")
        found = (_lines(ChainFiles(folder, prefix), wanted) for prefix in chains)
        yield from heapq.merge(*found, key=lambda line: line.entry.time)
    except OSError as error:
        raise AuditError(f"expected to read the audit log in {folder}: {error}") from error


def _is_among(wanted: str | None, names: Sequence[str | None]) -> bool:
    return wanted is None or as_name(wanted) in names


def _lines(files: ChainFiles, wanted: Search) -> Iterator[Line]:
    for item in read_files(files.found()):
        if isinstance(item, Line) and isinstance(item.entry, LinkedRecord) and wanted.finds(item.entry):
            yield item
