"""The file of keys: YAML, versioned, strict. It holds hashes, never a key."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steerserve.errors import KeyFileError, RequestError
from steerserve.policy.yaml_text import read_yaml

from .key_entry import KeyEntry, first_problem

__all__ = ["KeyFile", "Keys", "Stamp", "change_key_file", "parse_key_file", "read_key_file"]

_MAX_BYTES = 1 << 22
_HEADER = "# Keys of steerserve, written by `steerserve keys`; comments are not kept.\n"

Keys = tuple[KeyEntry, ...]


class KeyFile(BaseModel):
    """All keys; ids and names are unique."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    version: int = Field(1, ge=1, le=1)
    keys: Annotated[Keys, Field(strict=False)] = ()

    @model_validator(mode="after")
    def _are_unique(self) -> KeyFile:
        for field in ("id", "name"):
            counts = Counter(getattr(key, field) for key in self.keys)
            if len(counts) < len(self.keys):
                raise ValueError(f"expected each `{field}` once, got `{counts.most_common(1)[0][0]}` again")
        return self


class Stamp(NamedTuple):
    """What changes when a file is replaced or written, or its mode: chmod may be what it was waiting for."""

    ctime_ns: int
    mtime_ns: int
    size: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp of a file by its status."""
        return cls(status.st_ctime_ns, status.st_mtime_ns, status.st_size, status.st_ino)


def read_key_file(path: Path) -> tuple[KeyFile, Stamp]:
    """The keys in a file, and the stamp of what was read.

    Raises: KeyFileError if it cannot be read, anyone may write it, or an entry is wrong.
    """
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"expected a file of keys: {error.strerror} - in {path}") from None
    if status.st_mode & stat.S_IWOTH:
        raise KeyFileError(f"expected a file that not everyone may write (chmod 600) - in {path}")
    return parse_key_file(content, path), Stamp.of(status)


def parse_key_file(content: bytes, path: Path) -> KeyFile:
    """The keys that a file's bytes hold.

    Args: path: the file, for messages.
    Raises: KeyFileError naming the first field that is wrong.
    """
    if len(content) > _MAX_BYTES:
        raise KeyFileError(f"expected at most {_MAX_BYTES} bytes - in {path}")
    try:
        document = read_yaml(content)
        # Half of a file that is being written must not pass for one without keys.
        if not isinstance(document, dict) or not {"version", "keys"} <= document.keys():
            raise KeyFileError(f"expected `version: 1` and `keys` - in {path}")
        return KeyFile.model_validate(document)
    except ValidationError as error:
        raise KeyFileError(f"{first_problem(error)} - in {path}") from None
    except RequestError as error:
        raise KeyFileError(f"{error} - in {path}") from None


def change_key_file(path: Path, change: Callable[[Keys], Keys], *, create: bool = False) -> None:
    """Read, change and replace a key file; of two at once, the second waits and sees what the first wrote.

    Args: create: begin with an empty one where there is none.
    Raises: KeyFileError if it cannot be read or written, or as `change` does.
    """
    target = Path(os.path.realpath(path))
    try:
        with _locked(target):
            found = KeyFile() if create and not target.exists() else read_key_file(target)[0]
            _write(target, KeyFile(keys=change(found.keys)))
    except ValidationError as error:
        raise KeyFileError(f"{first_problem(error)} - in {path}") from None
    except OSError as error:
        raise KeyFileError(f"expected to write the key file: {error.strerror} - in {path}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock beside the file, not on it: the file itself is replaced."""
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, file: KeyFile) -> None:
    """Replace the file by a new one of mode 0600, all of it or nothing of it."""
    document = file.model_dump(mode="json", exclude_none=True)
    text = _HEADER + yaml.dump(document, Dumper=_Dumper, sort_keys=False)
    # mkstemp makes it 0600.
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            _keep_owner(stream, path)
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    _sync_folder(path.parent)


def _keep_owner(stream: IO[str], path: Path) -> None:
    """What root changes stays readable for the server's own user."""
    with suppress(FileNotFoundError, PermissionError):
        status = path.stat()
        os.fchown(stream.fileno(), status.st_uid, status.st_gid)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


class _Dumper(yaml.SafeDumper):
    """Quotes what begins with a digit: the id 483043204e89 would be read as a number beyond all bounds."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if text[:1].isdigit() else None)


_Dumper.add_representer(str, _quoted)
