"""Texts to harvest, streamed from files: lines, JSON lines, Parquet, or a Hugging Face dataset's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError

__all__ = ["Corpus", "Text", "open_corpus"]

# A file that has no line breaks is no text file: reading it whole could take any amount of memory.
_LONGEST_LINE = 16 * 2**20
_KINDS = "a .txt, .jsonl, .parquet or .arrow file, or a folder of Parquet files or of a saved HF dataset"


class Text(NamedTuple):
    """A text, and how many of the corpus' bytes have been read with it."""

    text: str
    read: int


@dataclass(frozen=True)
class Corpus:
    """Texts in the order of their files; never more than a batch of rows is in memory.

    Attributes: size: bytes of its files. texts: begins a new pass.
    """

    size: int
    texts: Callable[[], Iterator[Text]]

    def __iter__(self) -> Iterator[Text]:
        return self.texts()


def open_corpus(path: Path, field: str = "text") -> Corpus:
    """The texts of a file or folder; empty ones are left out.

    Args:
        path: .txt (a text per line), .jsonl (an object per line), .parquet, .arrow, a folder of Parquet
            files, or one that `datasets.save_to_disk` wrote.
        field: the key or the column that holds the text; lines have none.
    Raises: ConfigError naming the file; and, when it is reached, the line or row that is not as it should be.
    """
    if path.suffix in (".parquet", ".arrow") or path.is_dir():
        # pyarrow takes its time, and plain text needs none.
        from .tables import open_tables

        return open_tables(path, field)
    if not path.is_file():
        raise ConfigError(f"expected a file of texts, found none at {path}")
    if path.suffix not in (".jsonl", ".txt", ""):
        raise ConfigError(f"expected {_KINDS}, got {path}")
    texts = _json_texts if path.suffix == ".jsonl" else _line_texts
    return Corpus(path.stat().st_size, lambda: texts(path, field))


def _line_texts(path: Path, _: str) -> Iterator[Text]:
    return (Text(line, read) for _, line, read in _lines(path) if line.strip())


def _json_texts(path: Path, field: str) -> Iterator[Text]:
    for number, line, read in _lines(path):
        if line.strip():
            text = _text_of(line, field, path, number)
            if text.strip():
                yield Text(text, read)


def _lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """Each line with its number, from 1, and the bytes read up to its end."""
    read = 0
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), start=1):
            read += len(raw)
            if len(raw) == _LONGEST_LINE and not raw.endswith(b"\n"):
                raise ConfigError(
                    f"expected lines of less than {_LONGEST_LINE:,} bytes - {_at(path, number)}"
                )
            try:
                yield number, raw.decode("utf-8").rstrip("\r\n"), read
            except UnicodeDecodeError as error:
                raise ConfigError(f"expected UTF-8: {error} - {_at(path, number)}") from None


def _text_of(line: str, field: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)[field]
        text.encode("utf-8")  # half a surrogate pair is a string to JSON, and no text to a tokenizer
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ConfigError(f"expected a JSON object with a string `{field}` - {_at(path, number)}")
    return text


def _at(path: Path, number: int) -> str:
    return f"at line {number} of {path}"
