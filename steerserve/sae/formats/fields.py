"""Values of one JSON object, each taken with its kind checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerserve.errors import CheckpointError
from steerserve.sae.files import read_json

__all__ = ["Fields"]


@dataclass(frozen=True)
class Fields:
    """A config file's object.

    Attributes:
        path: the file, for messages.
        values: as parsed; a key that is absent reads as None.
    """

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Fields:
        """The object in a JSON file. Raises: CheckpointError if it holds anything else."""
        return cls(path, read_json(path))

    def section(self, key: str) -> Fields:
        """The object under `key`, or an empty one where the key is absent.

        Raises: CheckpointError if something else stands there.
        """
        value = self.values.get(key)
        if value is None:
            return Fields(self.path, {})
        if not isinstance(value, dict):
            raise CheckpointError(f"expected `{key}` to be an object, got {_short(value)}", path=self.path)
        return Fields(self.path, value)

    def positive(self, key: str) -> int:
        """An integer from 1. Raises: CheckpointError if it is none."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            message = f"expected a positive integer as `{key}`, got {_short(value)}"
            raise CheckpointError(message, path=self.path)
        return value

    def whole(self, key: str) -> int:
        """An integer from 0. Raises: CheckpointError if it is none."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            message = f"expected a whole number as `{key}`, got {_short(value)}"
            raise CheckpointError(message, path=self.path)
        return value

    def number(self, key: str) -> float:
        """A number above 0 that float32 can hold. Raises: CheckpointError if it is none."""
        value = self.values.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 3e38:
            return float(value)
        raise CheckpointError(f"expected a positive number as `{key}`, got {_short(value)}", path=self.path)

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false. Raises: CheckpointError if it is neither."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            message = f"expected true or false as `{key}`, got {_short(value)}"
            raise CheckpointError(message, path=self.path)
        return value

    def text(self, key: str) -> str | None:
        """A string, or None where the key is absent. Raises: CheckpointError if it is something else."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"expected text as `{key}`, got {_short(value)}", path=self.path)
        return value

    def one_of(self, key: str, choices: tuple[str, ...], *, default: str | None = None) -> str:
        """One of `choices`. Raises: CheckpointError if it is none of them."""
        value = self.values.get(key, default)
        if value not in choices:
            message = f"expected `{key}` to be one of {', '.join(choices)}, got {_short(value)}"
            raise CheckpointError(message, path=self.path)
        return str(value)

    def equal(self, key: str, found: int, where: str) -> None:
        """Compare a size to what the tensors say, if the key is there.

        Raises: CheckpointError if they differ.
        """
        value = self.values.get(key)
        if value is not None and (isinstance(value, bool) or value != found):
            message = f"expected `{key}` {found} as in `{where}`, got {_short(value)}"
            raise CheckpointError(message, path=self.path)


def _short(value: object) -> str:
    """A value for a message, however long it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return f"an integer of {math.floor(value.bit_length() * math.log10(2)) + 1} digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
