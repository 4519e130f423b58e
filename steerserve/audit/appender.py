"""Adding whole lines to a chain's files, or nothing: what a full disk let in is taken back."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from steerserve.errors import AuditError

from .files import ChainFiles
from .resume import Tail

__all__ = ["Appender"]


class Appender:
    """The file that is being written, and the turn to the next one.

    Args:
        max_bytes: a file that would grow beyond this ends; one batch alone may be larger.
        durable: wait until each batch would survive a loss of power.
    """

    def __init__(self, files: ChainFiles, tail: Tail, *, max_bytes: int, durable: bool) -> None:
        self._files = files
        self._max_bytes = max_bytes
        self._durable = durable
        self._number = tail.number
        self._size = tail.size
        self._day = tail.day
        self._spoiled = False
        self._descriptor = self._open(tail.number)

    @property
    def file(self) -> Path:
        """Where the last line lies."""
        return self._files.numbered(self._number)

    def append(self, content: bytes, day: str) -> None:
        """Write lines of one UTC day, all of them or none.

        Raises: OSError if they cannot be written; AuditError if the file is not as it was left.
        """
        if self._spoiled:
            self._restore()
        self._check_in_place()
        if self._size and (day != self._day or self._size + len(content) > self._max_bytes):
            self._turn()
        self._day = day
        try:
            self._write(content)
        except OSError:
            self._spoiled = True
            with suppress(OSError):
                self._restore()
            raise
        self._size += len(content)

    def close(self) -> None:
        """Give the file back."""
        os.close(self._descriptor)

    def _open(self, number: int, extra: int = 0) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | extra
        descriptor = os.open(self._files.numbered(number), flags, 0o640)
        if self._durable:
            self._sync_folder()
        return descriptor

    def _turn(self) -> None:
        descriptor = self._open(self._number + 1, os.O_EXCL)
        os.close(self._descriptor)
        self._descriptor = descriptor
        self._number += 1
        self._size = 0

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        if self._durable:
            os.fsync(self._descriptor)

    def _restore(self) -> None:
        os.ftruncate(self._descriptor, self._size)
        self._spoiled = False

    def _check_in_place(self) -> None:
        """Lines added to a file that was moved, deleted or cut meanwhile would be lost or break the chain."""
        path = self._files.numbered(self._number)
        status, ours = os.stat(path), os.fstat(self._descriptor)
        if not os.path.samestat(status, ours):
            raise AuditError(f"expected {path} to be the file that was opened, another one lies there")
        if ours.st_size != self._size:
            raise AuditError(f"expected {path} to have {self._size} bytes, got {ours.st_size}")

    def _sync_folder(self) -> None:
        descriptor = os.open(self._files.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
