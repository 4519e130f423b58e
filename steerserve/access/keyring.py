"""The key file in use: says who holds a key, and follows the file as it changes."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from steerserve.errors import KeyFileError, SteerserveError, UnauthenticatedError, UnavailableError

from .hashing import DEFAULT_COST, HASH_BYTES, SALT_BYTES
from .key_entry import KeyEntry
from .key_file import KeyFile, Stamp, read_key_file
from .key_text import KeyText, split_key_text
from .metrics import count_failed_reload
from .principal import Principal

__all__ = ["KeyRing"]

logger = logging.getLogger(__name__)

CHECK_EVERY = 0.5
MAX_WAITING = 256
_AT = ("headers", "authorization")


@dataclass(frozen=True)
class _Keys:
    """One reading of the file, with what was verified against it and what is being hashed for it.

    Both by the digest of a key's text. They end with the reading: what the old file's hash opened is no
    key of the new one.
    """

    entries: dict[str, KeyEntry]
    decoy: KeyEntry
    verified: set[bytes] = field(default_factory=set)
    hashing: dict[bytes, Future[bool]] = field(default_factory=dict)

    @classmethod
    def of(cls, file: KeyFile, known: _Keys | None = None) -> _Keys:
        """The keys of a file. Args: known: of these alone, where they are as they were."""
        kept = (key for key in file.keys if known is None or known.entries.get(key.id) == key)
        return cls({key.id: key for key in kept}, _decoy(file))

    def open(self, digest: bytes, key: KeyText) -> bool:
        """Hash the secret and remember whether it is right. An unknown id takes as long as a known one."""
        entry = self.entries.get(key.id)
        opens = (entry or self.decoy).opens_with(key.secret) and entry is not None
        if opens:
            self.verified.add(digest)
        return opens


class KeyRing:
    """The keys of a file. A changed file is used within half a second; a bad one leaves the last good one.

    scrypt runs in two threads and once per key: its result is remembered under a keyed digest until the file
    changes. Each process that serves has a ring of its own.

    Raises: KeyFileError if the file cannot be read at the start.

    Attributes:
        record: called, in a thread, with the names of the keys before others count. Where it raises, the
            keys that were taken away or changed no longer count, and new or changed ones not yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        file, self._seen = self._read()
        self._keys = _Keys.of(file)
        self._problem: str | None = None
        self.record: Callable[[str], None] = lambda _: None
        self._checked = time.monotonic()
        self._loading = threading.Lock()
        self._pepper = secrets.token_bytes(32)
        self._hashers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="steerserve-keys")

    @property
    def problem(self) -> str | None:
        """What is wrong with the file as it lies there, while the last good one holds; None if nothing."""
        self._follow()
        return self._problem

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the keys, sorted."""
        self._follow()
        return tuple(sorted(key.name for key in self._keys.entries.values()))

    @property
    def summary(self) -> str:
        """How many keys count, their names and ids; no secrets."""
        return _summary(self._keys.entries.values())

    async def authenticate(self, text: str | None) -> Principal:
        """Who holds the key of this text.

        Raises: UnauthenticatedError if it is no key, unknown or expired; UnavailableError if too many unknown
            keys wait to be hashed.
        """
        if self._is_due:
            await asyncio.to_thread(self._follow)
        key = split_key_text(text) if text else None
        if key is None:
            raise _unauthenticated("no key" if not text else "something else", "no_key")
        entry = await self._verified(key)
        if entry.expires is not None and entry.has_expired:
            raise _unauthenticated(
                f"key `{entry.name}`, which expired at {entry.expires.isoformat()}", "expired"
            )
        return entry.principal

    async def _verified(self, key: KeyText) -> KeyEntry:
        """The entry of a key, once its secret is known to be right."""
        keys, digest = self._keys, self._digest(key)
        entry = keys.entries.get(key.id)
        opens = digest in keys.verified or await self._hash(keys, digest, key)
        # The file may have changed meanwhile, and the key with it.
        if entry is None or not opens or self._keys.entries.get(key.id) != entry:
            raise _unauthenticated("an unknown key", "unknown_key")
        return entry

    async def _hash(self, keys: _Keys, digest: bytes, key: KeyText) -> bool:
        """Whether the key opens its entry; requests with the same key wait for the same answer."""
        future = keys.hashing.get(digest)
        if future is None:
            if len(keys.hashing) >= MAX_WAITING:
                message = f"expected at most {MAX_WAITING} new keys at a time: try again in a second"
                raise UnavailableError(message, at=_AT, reason="keys_busy")
            future = keys.hashing[digest] = self._hashers.submit(keys.open, digest, key)
            future.add_done_callback(lambda _: keys.hashing.pop(digest, None))
        # One client that leaves must not take the answer from the others.
        return await asyncio.shield(asyncio.wrap_future(future))

    def _digest(self, key: KeyText) -> bytes:
        return hashlib.blake2b(str(key).encode(), key=self._pepper, digest_size=32).digest()

    @property
    def _is_due(self) -> bool:
        return time.monotonic() - self._checked >= CHECK_EVERY and not self._loading.locked()

    def _follow(self) -> None:
        """Read the file if it is not the one that was read; one thread looks, every `CHECK_EVERY` seconds."""
        if self._is_due and self._loading.acquire(blocking=False):
            try:
                self._checked = time.monotonic()
                if self._stamp() != self._seen:
                    self._reload()
            finally:
                self._loading.release()

    def _stamp(self) -> Stamp | None:
        try:
            return Stamp.of(self._path.stat())
        except OSError:
            return None

    def _reload(self) -> None:
        before = self._stamp()
        try:
            file, seen = self._read()
        except KeyFileError as error:
            self._seen, self._problem = before, str(error)
            count_failed_reload()
            logger.error("The key file is left as it was last read: %s", error)
            return
        # What is taken away is gone at once; what is granted waits until it is on record.
        self._keys = _Keys.of(file, self._keys)
        try:
            self.record(_summary(file.keys))
        except SteerserveError as error:
            # Said once: this is tried again at every look.
            if self._problem != str(error):
                count_failed_reload()
                logger.error("New keys of %s do not count yet: %s", self._path, error)
            self._problem, self._seen = str(error), None
            return
        self._keys, self._problem, self._seen = _Keys.of(file), None, seen
        logger.info("Read %d keys from %s", len(file.keys), self._path)

    def _read(self) -> tuple[KeyFile, Stamp | None]:
        return read_key_file(self._path)


def _summary(keys: Iterable[KeyEntry]) -> str:
    names = sorted(f"{key.name} ({key.id})" for key in keys)
    return f"{len(names)} keys: {', '.join(names)}"


def _decoy(file: KeyFile) -> KeyEntry:
    """What an unknown id is hashed against, at the cost of a known one."""
    n, r, p = file.keys[0].cost if file.keys else DEFAULT_COST
    return KeyEntry(
        id="0" * 12,
        name="decoy",
        scopes=("infer",),
        created=datetime.fromtimestamp(0, UTC),
        salt="00" * SALT_BYTES,
        hash="00" * HASH_BYTES,
        n=n,
        r=r,
        p=p,
    )


def _unauthenticated(got: str, reason: str) -> UnauthenticatedError:
    message = f"expected a key in `Authorization: Bearer sk-steer-…` or `x-api-key`, got {got}"
    return UnauthenticatedError(message, at=_AT, reason=reason)
