"""A folder of policy files as the file system has it: listed, read, and changed with no half-way states."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from steerserve.errors import PolicyError, ReadOnlyError, RequestError, UnavailableError

from .document import MAX_BYTES

__all__ = [
    "Listing",
    "PolicyFile",
    "list_folder",
    "locked",
    "read_file",
    "read_folder",
    "read_steady",
    "remove_file",
    "write_file",
]

# Name, modification time in ns, size and inode of each file; the target's, where it is a link.
Listing = tuple[tuple[str, int, int, int], ...]

_SUFFIXES = (".yaml", ".yml")
_TRIES = 4
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class PolicyFile:
    """One file, whether or not what it holds is a policy."""

    path: Path
    content: bytes

    @property
    def sha256(self) -> str:
        """Of its bytes, in hex."""
        return hashlib.sha256(self.content).hexdigest()


def list_folder(folder: Path) -> Listing:
    """What changes whenever a policy file does, be it by a link that points elsewhere.

    Raises: PolicyError if the folder or a file of it cannot be looked at.
    """
    with _told(folder), os.scandir(folder) as entries:
        found = [(entry.name, entry.stat()) for entry in entries if _is_policy(entry.name)]
        return tuple(sorted((name, s.st_mtime_ns, s.st_size, s.st_ino) for name, s in found))


def read_folder(folder: Path) -> dict[str, PolicyFile]:
    """Every policy file by the name of its policy.

    Raises: PolicyError if one cannot be read, is too large, or shares its name with another.
    """
    files: dict[str, PolicyFile] = {}
    for file, *_ in list_folder(folder):
        name = file.rpartition(".")[0]
        if name in files:
            raise PolicyError(f"{file}: expected one file for each policy, got {files[name].path.name} too")
        files[name] = PolicyFile(folder / file, read_file(folder / file))
    return files


def read_file(path: Path) -> bytes:
    """What a file holds.

    Raises: PolicyError if it is no file, too large or cannot be read.
    """
    # Not blocking: a pipe in the folder would otherwise hold the server.
    with _told(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise PolicyError(f"{path.name}: expected a file")
            with open(descriptor, "rb", closefd=False) as stream:
                content = stream.read(MAX_BYTES + 1)
        finally:
            os.close(descriptor)
    if len(content) > MAX_BYTES:
        raise PolicyError(f"{path.name}: expected at most {MAX_BYTES} bytes, got more")
    return content


def read_steady(folder: Path) -> tuple[Listing, dict[str, PolicyFile]]:
    """The files as they lay there together, not some from before a change and some from after it.

    Raises: PolicyError if they cannot be read, or change all the time.
    """
    for _ in range(_TRIES):
        listing = list_folder(folder)
        files = read_folder(folder)
        if list_folder(folder) == listing:
            return listing, files
    raise PolicyError(f"{folder}: expected files that are not written to all the time")


def write_file(path: Path, content: bytes) -> None:
    """Put a file in place of the old one, at once and for good. Whoever calls holds the lock.

    Raises: ReadOnlyError or UnavailableError.
    """
    with _refused(path):
        aside = path.with_name(f".{path.name}.tmp")
        try:
            _write_through(aside, content)
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def remove_file(path: Path) -> None:
    """Take a file away for good.

    Raises: ReadOnlyError or UnavailableError.
    """
    with _refused(path):
        os.unlink(path)
        _sync_folder(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against every other writer that asks, in this process and in others.

    Raises: ReadOnlyError or UnavailableError.
    """
    with _refused(folder):
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with _refused(folder):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _is_policy(name: str) -> bool:
    return name.endswith(_SUFFIXES) and not name.startswith(".")


def _write_through(path: Path, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o644), "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PolicyError(f"{path}: expected policies that can be read: {error.strerror or error}") from None


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = f"`{path.name}`: {error.strerror or error}"
        raise _refusal_of(error.errno, why) from error


def _refusal_of(number: int | None, why: str) -> RequestError:
    if number in _NOT_WRITABLE:
        message = (
            f"expected a folder of policies that can be written, change its files where they come from: {why}"
        )
        return ReadOnlyError(message, at=(), reason="read_only")
    return UnavailableError(f"expected the folder of policies to take the change: {why}", at=(), reason="io")
