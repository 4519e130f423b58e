"""Reading files of lines: each is an entry exactly as it was written, or a fault with its place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from .chain import Head, canonical
from .heads import Hash, HeadLine
from .record import Count, Record

__all__ = ["Fault", "Item", "Line", "LinkedRecord", "Torn", "read_files", "read_last", "read_lines"]

# Far beyond what `Record`'s bounds let a line become.
MAX_LINE = 1 << 20

Kind = Literal[
    "bad signature",
    "deleted",
    "edited",
    "file missing",
    "inserted",
    "not JSON",
    "reordered",
    "truncated",
]


class LinkedRecord(Record):
    """A record at its place in the chain."""

    seq: Count
    prev: Hash


@dataclass(frozen=True)
class Line:
    """One sound line; whether it follows the one before is for others to say."""

    file: Path
    number: int
    raw: bytes
    entry: LinkedRecord | HeadLine

    @cached_property
    def head(self) -> Head:
        """Where the chain is once this line has been read."""
        return Head(self.entry.seq, hashlib.sha256(self.raw).hexdigest())

    def follows(self, head: Head) -> bool:
        """Whether the line claims this place in the chain."""
        return self.entry.seq == head.seq + 1 and self.entry.prev == head.hash


@dataclass(frozen=True)
class Torn:
    """The last line of the last file lacks its newline: `size` bytes that a crash cut short."""

    file: Path
    number: int
    size: int


@dataclass(frozen=True)
class Fault:
    """What is wrong with the log, and where: a line of a file from 1, or the file as a whole."""

    kind: Kind
    why: str
    file: Path
    line: int | None = None

    def __str__(self) -> str:
        place = str(self.file) if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.kind}: {self.why}"


Item = Line | Torn | Fault
_ENTRY: TypeAdapter[LinkedRecord | HeadLine] = TypeAdapter(
    Annotated[LinkedRecord | HeadLine, Field(discriminator="event")]
)


def read_files(files: Sequence[Path], advance: Callable[[int], None] = lambda _: None) -> Iterator[Item]:
    """The lines of a chain's files in order; a half line is torn only at the end of the last."""
    for path in files:
        for item in read_lines(path, advance):
            if isinstance(item, Torn) and path != files[-1]:
                yield Fault("truncated", "expected a whole line, got a half one", item.file, item.number)
            else:
                yield item


def read_lines(path: Path, advance: Callable[[int], None] = lambda _: None) -> Iterator[Item]:
    """The lines of one file, sound or not; one too long to be read whole is the last."""
    with path.open("rb") as stream:
        number = 0
        while chunk := stream.readline(MAX_LINE + 1):
            number += 1
            advance(len(chunk))
            if len(chunk) > MAX_LINE:
                yield Fault("edited", f"expected at most {MAX_LINE} bytes in a line", path, number)
                return
            item = _item(path, number, chunk)
            yield item
            if isinstance(item, Torn):
                # A server that writes meanwhile may complete it: what then follows is the rest of a line.
                return


def read_last(path: Path) -> Item | None:
    """The last line of a file; None of an empty one. Its number is not known, and stays 0."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - MAX_LINE))
        chunks = stream.readlines()
    return _item(path, 0, chunks[-1]) if chunks else None


def _item(path: Path, number: int, chunk: bytes) -> Item:
    if not chunk.endswith(b"\n"):
        return Torn(path, number, len(chunk))
    raw = chunk[:-1]
    try:
        entry = _ENTRY.validate_json(raw)
    except ValidationError as error:
        return _fault(path, number, error)
    if canonical(entry.model_dump()) != raw:
        return Fault(
            "edited", "expected the line as it would be written, it is spelled otherwise", path, number
        )
    return Line(path, number, raw, entry)


def _fault(path: Path, number: int, error: ValidationError) -> Fault:
    problem = error.errors(include_url=False, include_input=False)[0]
    if problem["type"] == "json_invalid":
        return Fault("not JSON", problem["msg"], path, number)
    # Whoever wrote the line chose these names: nothing in them may reach a terminal as it is.
    field = ascii(".".join(str(part) for part in problem["loc"])[:200])
    return Fault("edited", f"expected an entry: {problem['msg']}, at {field}", path, number)
