"""Keys that are cheap to hash, and files of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from steerserve.access.hashing import Cost, hash_secret
from steerserve.access.key_entry import KeyEntry
from steerserve.access.key_file import change_key_file
from steerserve.access.key_text import KeyText, new_key_text

CHEAP = Cost(n=2**10, r=1, p=1)
WriteKeys = Callable[..., Path]


def make_entry(key: KeyText, name: str = "team", **fields: Any) -> KeyEntry:
    salt = b"\x07" * 16
    return KeyEntry.model_validate(
        {
            "id": key.id,
            "name": name,
            "scopes": ["infer"],
            "created": datetime(2026, 1, 1, tzinfo=UTC),
            "salt": salt.hex(),
            "hash": hash_secret(key.secret, salt, CHEAP).hex(),
            **CHEAP._asdict(),
            **fields,
        }
    )


@pytest.fixture
def key() -> KeyText:
    return new_key_text()


@pytest.fixture
def write_keys(tmp_path: Path) -> WriteKeys:
    """Replaces the file of keys by these."""
    path = tmp_path / "keys.yaml"

    def write(*entries: KeyEntry) -> Path:
        change_key_file(path, lambda _: entries, create=not path.exists())
        return path

    return write
