"""The audit log as a server holds it: records go in from any thread, one thread writes them."""

from __future__ import annotations

import asyncio
import atexit
import fcntl
import logging
import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Literal

from steerserve.errors import AuditError

from . import metrics
from .appender import Appender
from .chain import Head, link
from .files import PRIVATE_KEY, PUBLIC_KEY, ChainFiles
from .heads import head_line, write_head_file
from .record import Record, utc_now
from .resume import Tail, resume
from .signing import SigningKey, make_key, read_signing_key, show_key

__all__ = ["AuditLog"]

logger = logging.getLogger(__name__)

MAX_BYTES = 64 << 20
MAX_BATCH = 512
# What may wait for a disk that hangs: some tens of MiB.
MAX_WAITING = 65_536

_Entry = tuple[Record, "Future[Head]"]


class AuditLog:
    """Appends records to a chain of JSON lines, and signs its head from time to time.

    Args:
        folder: where the files are; made if it is not there.
        prefix: names the chain; processes that share a folder take one each.
        key: PEM of the signing key. Without it one is made in the folder.
        fsync: "batch" waits for the disk before a record counts as written; "never" leaves that to the
            kernel, which survives the death of the process but no loss of power.
        max_bytes: a file ends before it grows beyond this.
        head_lines, head_seconds: a signed head follows after so many lines, or so long after a new one.
    Raises: AuditError if the folder cannot be written, another process writes this chain, or its end is not
        what was written.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str = "audit",
        *,
        key: Path | None = None,
        fsync: Literal["never", "batch"] = "batch",
        max_bytes: int = MAX_BYTES,
        head_lines: int = 256,
        head_seconds: float = 10.0,
    ) -> None:
        self._files = ChainFiles(Path(folder), prefix)
        self._durable = fsync == "batch"
        self._head_lines = head_lines
        self._head_seconds = head_seconds
        self._queue: SimpleQueue[_Entry | None] = SimpleQueue()
        self._gate = threading.Lock()
        self._closed = False
        self._problem: str | None = None
        self._news = 0
        self._due = 0.0
        self._lock = _lock(self._files)
        try:
            tail = self._open(key, max_bytes)
        except BaseException:
            os.close(self._lock)
            raise
        self._thread = threading.Thread(target=self._run, name=f"audit-{prefix}", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        self._start(tail)

    @property
    def head(self) -> Head:
        """Where the chain is: what to keep elsewhere, and to hand to `verify` one day."""
        return self._head

    @property
    def problem(self) -> str | None:
        """Why the last write failed; None where it did not."""
        return self._problem

    @property
    def healthy(self) -> bool:
        """Whether the last write succeeded. Each append tries again, and the writer does now and then."""
        return self._problem is None

    def append(self, record: Record) -> Future[Head]:
        """Queue a record, in microseconds.

        Returns: its place in the chain, once it is written; an AuditError if it was not.
        """
        future = _running()
        with self._gate:
            refused = self._refusal()
            if refused is None:
                self._queue.put((record, future))
        if refused is not None:
            metrics.failures.labels(self._files.prefix).inc()
            future.set_exception(AuditError(refused))
        return future

    async def written(self, record: Record) -> Head:
        """Append a record, and wait until it is written.

        Raises: AuditError if it was not.
        """
        return await asyncio.wrap_future(self.append(record))

    def close(self) -> None:
        """Write what is queued and a last signed head, and let the next writer in."""
        with self._gate:
            if self._closed:
                return
            self._queue.put((Record(event="stop"), _running()))
            self._queue.put(None)
            self._closed = True
        self._thread.join()
        atexit.unregister(self.close)
        self._appender.close()
        os.close(self._lock)

    def _open(self, key: Path | None, max_bytes: int) -> Tail:
        try:
            self._key = _signing_key(self._files.folder, key)
            tail = resume(self._files, self._key, durable=self._durable)
            self._head = tail.head
            self._appender = Appender(self._files, tail, max_bytes=max_bytes, durable=self._durable)
        except OSError as error:
            raise _unwritable(self._files.folder, error) from error
        return tail

    def _start(self, tail: Tail) -> None:
        """The first record says what was found, and proves that the folder can be written."""
        try:
            self.append(Record(event="start", detail=tail.note)).result()
        except AuditError:
            self.close()
            raise

    def _refusal(self) -> str | None:
        if self._closed:
            return "expected an open audit log, it was closed"
        if self._queue.qsize() >= MAX_WAITING:
            return f"expected the disk to keep up, {MAX_WAITING} records wait to be written"
        return None

    def _run(self) -> None:
        last = False
        while not last:
            entries, last = self._take()
            due = self._due <= time.monotonic() and self._restless
            sign = last or due or self._news + len(entries) >= self._head_lines
            if entries or sign:
                self._flush(entries, sign=sign)

    @property
    def _restless(self) -> bool:
        """Whether there is something to do without a new record: a head to sign, a disk to try again."""
        return self._news > 0 or not self.healthy

    def _take(self) -> tuple[list[_Entry], bool]:
        """The records that wait, and whether they are the last; none once the next head is due."""
        entries: list[_Entry] = []
        patience = max(0.0, self._due - time.monotonic()) if self._restless else None
        try:
            entry = self._queue.get(timeout=patience)
            while entry is not None:
                entries.append(entry)
                if len(entries) == MAX_BATCH:
                    return entries, False
                entry = self._queue.get_nowait()
        except Empty:
            return entries, False
        return entries, True

    def _flush(self, entries: list[_Entry], *, sign: bool) -> None:
        if not self._restless or sign:
            self._due = time.monotonic() + self._head_seconds
        try:
            self._write(entries, sign=sign)
        except Exception as error:  # whatever it is, nobody may wait for ever
            self._fail(entries, error)
        else:
            self._show(None)

    def _write(self, entries: list[_Entry], *, sign: bool) -> None:
        """Raises: OSError or AuditError; of the entries those whose future is done are written."""
        started = time.perf_counter()
        lines, heads = [], [self._head]
        for record, _ in entries:
            lines.append(link(record.model_dump(), heads[-1]))
            heads.append(heads[-1].then(lines[-1]))
        if sign:
            lines.append(head_line(heads[-1], self._key))
            heads.append(heads[-1].then(lines[-1]))
        self._appender.append(b"\n".join([*lines, b""]), utc_now()[:10])
        self._head = heads[-1]
        self._news = 0 if sign else self._news + len(entries)
        for (_, future), head in zip(entries, heads[1:], strict=False):
            future.set_result(head)
        metrics.lines.labels(self._files.prefix).inc(len(entries))
        metrics.write_seconds.labels(self._files.prefix).observe(time.perf_counter() - started)
        path, file = self._files.head, self._appender.file
        write_head_file(path, self._head, file, self._key, durable=self._durable)

    def _fail(self, entries: list[_Entry], error: Exception) -> None:
        problem = f"expected to write to {self._appender.file}: {error}"
        lost = [future for _, future in entries if not future.done()]
        metrics.failures.labels(self._files.prefix).inc(len(lost))
        self._show(problem)
        for future in lost:
            future.set_exception(AuditError(problem))

    def _show(self, problem: str | None) -> None:
        if problem is not None and self.healthy:
            logger.error("the audit log cannot be written: %s", problem)
        elif problem is None and not self.healthy:
            logger.warning("the audit log is written again")
        self._problem = problem
        metrics.healthy.labels(self._files.prefix).set(problem is None)


def _running() -> Future[Head]:
    """A future that cannot be cancelled: the record of a client that left is written all the same."""
    future: Future[Head] = Future()
    future.set_running_or_notify_cancel()
    return future


def _lock(files: ChainFiles) -> int:
    """Keep other writers out; the kernel gives the lock back when the process dies.

    Raises: AuditError if another one holds it.
    """
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(files.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise _unwritable(files.folder, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise AuditError(
            f"expected no other writer of {files.lock.with_suffix('')}, there is one: give each process a "
            "prefix of its own"
        ) from None
    return descriptor


def _signing_key(folder: Path, path: Path | None) -> SigningKey:
    """Raises: AuditError if there is none, or the folder's log is signed with another."""
    own = folder / PRIVATE_KEY
    try:
        key = make_key(own) if path is None and not own.exists() else read_signing_key(path or own)
    except AuditError:
        if path is not None or not own.exists():
            raise
        key = read_signing_key(own)
    show_key(folder / PUBLIC_KEY, key.public)
    return key


def _unwritable(folder: Path, error: OSError) -> AuditError:
    return AuditError(f"expected to write an audit log to {folder}: {error}")
