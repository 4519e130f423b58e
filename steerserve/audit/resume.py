"""Where a chain goes on: its last file is checked before a writer adds to it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from steerserve.errors import AuditError

from .chain import GENESIS, Head
from .checking import Walk
from .files import ChainFiles
from .heads import HeadFile, write_head_file
from .lines import Fault, Line, read_files, read_last
from .record import utc_now
from .signing import SigningKey
from .verify import sound_head_file

__all__ = ["Tail", "resume"]


@dataclass(frozen=True)
class Tail:
    """The end of a chain: its head, the number, length and day of its last file.

    `unsigned` lines were found behind the signed head, and `torn` bytes of a half line, which are gone.
    """

    head: Head
    number: int
    size: int
    day: str
    unsigned: int = 0
    torn: int = 0

    @property
    def note(self) -> str:
        """What a crash left, for the record of the start."""
        notes = []
        if self.unsigned:
            notes.append(f"went on behind {self.unsigned} lines that no head had signed")
        if self.torn:
            notes.append(f"dropped the {self.torn} bytes of a half-written line")
        return ", ".join(notes)


def resume(files: ChainFiles, key: SigningKey, *, durable: bool) -> Tail:
    """Find the end of a chain, or begin one, and drop the half line that a crash left.

    Raises: AuditError if the end is not what was written; OSError.
    """
    paths = files.found()
    if not paths and not files.head.exists():
        # Before the first line: a log without its signed head can then only be one that lost it.
        write_head_file(files.head, GENESIS, files.numbered(1), key, durable=durable)
        return Tail(GENESIS, 1, 0, utc_now()[:10])
    signed = sound_head_file(files, key.public)
    if isinstance(signed, Fault):
        raise _tampered(signed)
    _check_names(files, paths, signed)
    walk = Walk(files.folder, key.public, _head_before(paths), signed)
    fault = walk.run(read_files(paths[-1:]))
    if fault is not None:
        raise _tampered(fault)
    day = walk.last.entry.time[:10] if walk.last else utc_now()[:10]
    size = paths[-1].stat().st_size if paths else 0
    torn = walk.torn.size if walk.torn else 0
    if torn:
        os.truncate(paths[-1], size - torn)
    unsigned = walk.head.seq - signed.seq
    return Tail(walk.head, max(len(paths), 1), size - torn, day, unsigned, torn)


def _head_before(paths: list[Path]) -> Head:
    """The head at the end of the last file but one."""
    if len(paths) < 2:
        return GENESIS
    last = read_last(paths[-2])
    if not isinstance(last, Line):
        raise _tampered(Fault("truncated", "expected a sound line at the end", paths[-2]))
    return last.head


def _check_names(files: ChainFiles, paths: list[Path], signed: HeadFile) -> None:
    wanted = [files.numbered(number) for number in range(1, len(paths) + 1)]
    if signed.seq:
        wanted.append(files.folder / signed.file)
    missing = next((path for path in wanted if path not in paths), None)
    if missing is not None:
        raise _tampered(Fault("file missing", "expected it in the chain", missing))


def _tampered(fault: Fault) -> AuditError:
    return AuditError(
        f"expected the audit log to end as it was written, got {fault} (keep the folder as evidence, and "
        "begin a new one)"
    )
