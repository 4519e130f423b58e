"""Signed heads: lines that vouch for all before them, and the file that says where the chain ends."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .chain import Head, canonical
from .files import read_whole, replace_file
from .record import Count, Moment, utc_now
from .signing import SigningKey, VerifyingKey

__all__ = ["HeadFile", "HeadLine", "head_line", "read_head_file", "write_head_file"]

MAX_HEAD_FILE = 4096

Hash = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
_KeyId = Annotated[str, Field(pattern=r"\A[0-9a-f]{32}\z")]
_Signature = Annotated[str, Field(pattern=r"\A[0-9a-f]{128}\z")]


class _Signed(BaseModel):
    """What is signed is the canonical JSON of everything but the signature."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    time: Moment
    seq: Count
    key_id: _KeyId
    signature: _Signature

    def fault(self, key: VerifyingKey) -> str | None:
        """Why this is not what the key's owner signed; None if it is."""
        if self.key_id != key.id:
            return f"expected a signature of the key {key.id}, got one of {self.key_id}"
        if not key.accepts(self.signature, canonical(self.model_dump(exclude={"signature"}))):
            return (
                f"expected a signature of the key {key.id} over what stands here, it is over something else"
            )
        return None


class HeadLine(_Signed):
    """A line of the log: everything up to `prev`, the hash of the line before, is as it was written."""

    event: Literal["head"]
    prev: Hash


class HeadFile(_Signed):
    """The chain reaches at least to this line of this file."""

    hash: Hash
    file: Annotated[str, Field(min_length=1, max_length=128)]

    @property
    def head(self) -> Head:
        """The place in the chain."""
        return Head(self.seq, self.hash)


def head_line(head: Head, key: SigningKey) -> bytes:
    """The line, without its newline, that signs the chain up to `head`."""
    stands = {"event": "head", "time": utc_now(), "seq": head.seq + 1, "prev": head.hash}
    return _signed(stands, key)


def write_head_file(path: Path, head: Head, file: Path, key: SigningKey, *, durable: bool) -> None:
    """Replace the file at `path` at once.

    Raises: OSError.
    """
    stands = {"time": utc_now(), "seq": head.seq, "hash": head.hash, "file": file.name}
    replace_file(path, _signed(stands, key) + b"\n", durable=durable)


def read_head_file(path: Path) -> HeadFile | str | None:
    """The file's content; None if there is none; what is wrong with it, if it is no such file."""
    content = read_whole(path, MAX_HEAD_FILE)
    if content is None:
        return None
    try:
        found = HeadFile.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        return f"expected a signed head: {problem['msg']}"
    if canonical(found.model_dump()) + b"\n" != content:
        return "expected the signed head as it would be written, it is spelled otherwise"
    return found


def _signed(stands: dict[str, Any], key: SigningKey) -> bytes:
    stands["key_id"] = key.public.id
    return canonical({**stands, "signature": key.sign(canonical(stands))})
