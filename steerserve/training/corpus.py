"""Texts to harvest, from files."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import ConfigError

__all__ = ["read_texts"]


def read_texts(path: Path) -> list[str]:
    """The texts of a .jsonl file (field `text`) or a text file (one per line); empty ones are left out.

    Raises: ConfigError naming the line that is not what it should be.
    """
    if not path.is_file():
        raise ConfigError(f"expected a file of texts, found none at {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    texts = [_text_of(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    return [text for text in texts if text]


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ConfigError(f"expected a JSON object with a string `text` - at line {number} of {path}")
    return text
