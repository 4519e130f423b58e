"""What identifies weights: a digest of their files' bytes, and of nothing else about the files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

from steerserve.errors import CheckpointError

from .manifest import MANIFEST, STATS

__all__ = ["content_digest"]

logger = logging.getLogger(__name__)

_CHUNK = 1 << 22
_SIZE = 16  # bytes of a digest
_THREADS = 8
# A file from this size on is hashed once, and not again by each of an engine's processes.
_REMEMBERED_FROM = 64 << 20
# What a checkpoint's folder may hold without any of it saying what the SAE computes.
_SILENT_NAMES = (MANIFEST, STATS)
_SILENT_SUFFIXES = (".md", ".txt")
_HEX = re.compile(rb"[0-9a-f]{%d}" % (2 * _SIZE))


def content_digest(path: Path) -> str:
    """Equal for equal weights, wherever and whenever they were copied; another one if any byte differs.

    Every byte is read: by several threads, past the holes of sparse files, and of a large file once for each
    time that it is written (see `_remembered`).

    Args: path: a file, whatever it is called; or a folder, of which hidden files, our manifest and statistics
        beside the weights, and texts for people do not count.
    Returns: 32 hexadecimal digits.
    Raises: CheckpointError if a file cannot be read.
    """
    try:
        return _file_digest(path) if path.is_file() else _folder_digest(path)
    except OSError as error:
        raise CheckpointError(f"expected to read all of it: {error}", path=path) from error


def _folder_digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=_SIZE)
    for file in sorted(item for item in folder.iterdir() if item.is_file() and _speaks(item.name)):
        digest.update(f"{file.name}\0{_file_digest(file)}\n".encode())
    return digest.hexdigest()


def _speaks(name: str) -> bool:
    return not name.startswith(".") and name not in _SILENT_NAMES and not name.endswith(_SILENT_SUFFIXES)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size < _REMEMBERED_FROM:
            return _hashed(file.fileno(), status.st_size)
        return _remembered(path, file.fileno(), status)


def _remembered(path: Path, descriptor: int, status: os.stat_result) -> str:
    """The digest of a large file, kept in the user's cache under all that changes when a file is written.

    Of several processes that ask at once, one reads the file and the others wait. Where there is no place to
    keep it, each of them reads the file.
    """
    place = f"{path.resolve()}|{status.st_dev}|{status.st_ino}|{status.st_size}"
    state = f"{place}|{status.st_mtime_ns}|{status.st_ctime_ns}"
    folder = _cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        kept = os.open(folder / _short(state.encode()).hex(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        logger.warning("The digest of %s cannot be kept, each process reads the file: %s", path, error)
        return _hashed(descriptor, status.st_size)
    try:
        fcntl.flock(kept, fcntl.LOCK_EX)
        known = os.pread(kept, 2 * _SIZE + 1, 0)
        if _HEX.fullmatch(known):
            return known.decode()
        logger.info("Reading %s once, %.1f GB, for the digest of its content", path, status.st_size / 1e9)
        found = _hashed(descriptor, status.st_size)
        with suppress(OSError):
            os.ftruncate(kept, 0)
            os.pwrite(kept, found.encode(), 0)
        return found
    finally:
        os.close(kept)


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "steerserve" / "digests"


def _hashed(descriptor: int, size: int) -> str:
    """The digest of the digests of chunks, which several threads hash at once: hashlib lets go of the GIL."""
    whole = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=_SIZE)

    def part(at: int) -> bytes:
        count = min(_CHUNK, size - at)
        return _zeros(count) if _is_hole(descriptor, at, count) else _short(_read(descriptor, count, at))

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="steerserve-digest") as pool:
        for digest in pool.map(part, range(0, size, _CHUNK)):
            whole.update(digest)
    return whole.hexdigest()


def _read(descriptor: int, count: int, at: int) -> bytes:
    """Raises: OSError if the file ends before."""
    data = os.pread(descriptor, count, at)
    while len(data) < count:
        more = os.pread(descriptor, count - len(data), at + len(data))
        if not more:
            raise OSError(f"expected {count} bytes at {at}, got {len(data)}: the file was cut short")
        data += more
    return data


def _is_hole(descriptor: int, at: int, count: int) -> bool:
    """Whether nothing was ever written there, which reads as zeros. A file system need not tell."""
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA) >= at + count
    except OSError as error:
        return error.errno == errno.ENXIO


def _short(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_SIZE).digest()


@cache
def _zeros(count: int) -> bytes:
    return _short(bytes(count))
