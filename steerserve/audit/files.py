"""What lies in the folder of an audit log, by name: files of lines, the head, the lock, the key.

audit-000001.jsonl  audit-000002.jsonl …   the chain of the prefix `audit`
audit.head.json                            where it ends, signed
audit.lock                                 held by the process that writes it
signing-key.pub.pem                        whose signatures to expect; one key for all of the folder
signing-key.pem                            its private half, where no other place was configured
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from steerserve.errors import ConfigError

__all__ = ["PRIVATE_KEY", "PUBLIC_KEY", "ChainFiles", "chains_in", "read_whole", "replace_file"]

PRIVATE_KEY = "signing-key.pem"
PUBLIC_KEY = "signing-key.pub.pem"

_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_LINES = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,63})-([0-9]{6,9})\.jsonl")
_HEAD = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,63})\.head\.json")


@dataclass(frozen=True)
class ChainFiles:
    """The files of one chain."""

    folder: Path
    prefix: str

    def __post_init__(self) -> None:
        if not _PREFIX.fullmatch(self.prefix):
            raise ConfigError(
                f"expected a prefix of letters, digits, `_` and `-`, at most 64, got {self.prefix!r}"
            )

    @property
    def head(self) -> Path:
        """The signed end of the chain."""
        return self.folder / f"{self.prefix}.head.json"

    @property
    def lock(self) -> Path:
        """Locked by the one writer."""
        return self.folder / f"{self.prefix}.lock"

    def numbered(self, number: int) -> Path:
        """The chain's n-th file of lines, from 1."""
        return self.folder / f"{self.prefix}-{number:06d}.jsonl"

    def found(self) -> list[Path]:
        """The files of lines that are there, in order."""
        named = ((_LINES.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((path for name, path in named if name and name[1] == self.prefix), key=_number_of)


def _number_of(path: Path) -> int:
    """Which file of its chain this is, from 1."""
    return int(path.stem.rpartition("-")[2])


def chains_in(folder: Path) -> list[str]:
    """The prefixes of the chains in the folder, sorted: of all that have lines, or a head, or both."""
    names = [path.name for path in folder.iterdir()]
    found = [pattern.fullmatch(name) for name in names for pattern in (_LINES, _HEAD)]
    return sorted({match[1] for match in found if match})


def read_whole(path: Path, limit: int) -> bytes | None:
    """A small file's bytes, `limit` of them at most; None where there is no such file."""
    try:
        with path.open("rb") as stream:
            return stream.read(limit)
    except FileNotFoundError:
        return None


def replace_file(path: Path, content: bytes, *, durable: bool) -> None:
    """Put `content` in the place of `path`, at once: a reader sees the old bytes or the new ones."""
    part = path.with_name(f".{path.name}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        if os.write(descriptor, content) < len(content):
            raise OSError(None, "only a part could be written", str(path))
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(part, path)
