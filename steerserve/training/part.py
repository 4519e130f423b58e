"""A harvest that several processes share: each takes every n-th text, to shards of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from steerserve.errors import ConfigError
from steerserve.sae.files import read_json

from .corpus import Corpus
from .shard_file import INDEX, whole_shards

__all__ = ["WHOLE", "Part", "check_parts", "join_parts"]

Prompt = TypeVar("Prompt")


@dataclass(frozen=True)
class Part:
    """Texts `number`, `number + of`, … of a corpus, whose sequences are numbered likewise.

    Attributes: number: from 0. of: how many parts there are.
    """

    number: int
    of: int

    def folder(self, shards: Path) -> Path:
        """Where this part's shards go. Args: shards: the folder of the whole harvest of one layer."""
        return shards if self.of == 1 else shards / f"part-{self.number}-of-{self.of}"

    def take(self, prompts: Corpus | Iterable[Prompt]) -> Corpus | Iterable[Prompt]:
        """The texts of this part; of a corpus, all are read."""
        if isinstance(prompts, Corpus):
            return Corpus(prompts.size, lambda: self._every(prompts))
        return self._every(prompts)

    def _every(self, texts: Iterable[Prompt]) -> Iterator[Prompt]:
        return islice(texts, self.number, None, self.of)


WHOLE = Part(0, 1)


def check_parts(shards: Path, of: int) -> None:
    """Refuse a folder of one layer that holds a harvest in another number of parts.

    Raises: ConfigError saying how many there are.
    """
    found = {path.name.rpartition("-")[2] for path in shards.glob("part-*-of-*")}
    if of > 1 and whole_shards(shards):
        found.add("1")
    if others := found - {str(of)}:
        raise ConfigError(
            f"expected a harvest in {of} part{'s' if of > 1 else ''}, {shards} holds one of {min(others)} "
            "(go on with as many data-parallel replicas, or harvest to a new folder)"
        )


def join_parts(shards: Path, of: int) -> int:
    """Write the index of a harvest whose parts are all whole: their shards, one part after the other.

    Returns: how many rows there are.
    Raises: ConfigError if a part is not whole, or of another harvest than the first.
    """
    entries: list[dict[str, object]] = []
    headers: list[dict[str, object]] = []
    for number in range(of):
        folder = Part(number, of).folder(shards)
        if not (folder / INDEX).exists():
            raise ConfigError(f"expected a whole harvest in {folder}")
        index = read_json(folder / INDEX)
        headers.append({key: value for key, value in index.items() if key not in ("rows", "shards")})
        entries += [{**shard, "file": f"{folder.name}/{shard['file']}"} for shard in index["shards"]]
    if any(header != headers[0] for header in headers):
        raise ConfigError(f"expected parts of one harvest in {shards}, got {headers}")
    rows = sum(int(str(entry["rows"])) for entry in entries)
    whole = {**headers[0], "shards": entries, "rows": rows}
    part = shards / f".{INDEX}.part"
    part.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    part.replace(shards / INDEX)
    return rows
