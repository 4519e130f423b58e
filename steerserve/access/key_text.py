"""The text of a key: `sk-steer-ID-SECRET`. The id is public and finds the entry: one hash suffices."""

from __future__ import annotations

import re
import secrets
from typing import NamedTuple

__all__ = ["ID_PATTERN", "KeyText", "new_key_text", "split_key_text"]

ID_PATTERN = r"[0-9a-f]{12}"
_KEY = re.compile(rf"sk-steer-({ID_PATTERN})-([A-Za-z0-9_-]{{43}})")


class KeyText(NamedTuple):
    """A key as its owner holds it."""

    id: str
    secret: str

    def __str__(self) -> str:
        return f"sk-steer-{self.id}-{self.secret}"


def new_key_text() -> KeyText:
    """A key that nobody has: 32 random bytes under a random id."""
    return KeyText(secrets.token_hex(6), secrets.token_urlsafe(32))


def split_key_text(text: str) -> KeyText | None:
    """The parts of a key's text; None if it is no such text."""
    found = _KEY.fullmatch(text)
    return KeyText(*found.groups()) if found else None
