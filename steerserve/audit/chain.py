"""How lines hold together: each names the hash of the one before, so that none can change alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steerserve.errors import ConfigError

__all__ = ["GENESIS", "Head", "canonical", "link"]


@dataclass(frozen=True)
class Head:
    """A place in the chain: the number of its last line, and the SHA-256 of that line's bytes.

    Whoever knows one from outside can tell whether the chain up to there is still the same.
    """

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """The inverse of `str`.

        Raises: ConfigError if the text is no SEQ:HASH.
        """
        found = re.fullmatch(r"([0-9]{1,18}):([0-9a-f]{64})", text)
        if found is None:
            raise ConfigError(f"expected a head SEQ:HASH with 64 hexadecimal digits, got {text[:100]!r}")
        return cls(int(found[1]), found[2])

    def then(self, line: bytes) -> Head:
        """The head once this line has followed."""
        return Head(self.seq + 1, hashlib.sha256(line).hexdigest())


GENESIS = Head(0, "0" * 64)


def canonical(document: Mapping[str, Any]) -> bytes:
    """The one way to write a JSON object: sorted keys, no spaces, ASCII, finite numbers."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def link(document: Mapping[str, Any], head: Head) -> bytes:
    """The line, without its newline, that puts `document` behind `head`."""
    return canonical({**document, "seq": head.seq + 1, "prev": head.hash})
