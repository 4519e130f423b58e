"""JSON as it came: an object that names a key twice keeps what a plain parser would drop."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["Repeated", "parse", "parse_named"]


class Repeated(dict[str, Any]):
    """An object that names a key twice; `dropped` are the pairs that a later one with their key replaced."""

    dropped: list[tuple[str, Any]]


def parse(text: bytes | str) -> Any:
    """As `json.loads`, which the server's own parser is; the last of several values of a key holds there too.

    Raises: ValueError or RecursionError.
    """
    return json.loads(text, object_pairs_hook=_object)


def parse_named(text: bytes | str) -> tuple[Any, set[str]]:
    """As `parse`, with every key of every object in it, those among them that were dropped.

    Raises: ValueError or RecursionError.
    """
    names: set[str] = set()

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = _object(pairs)
        names.update(found)
        return found

    return json.loads(text, object_pairs_hook=note), names


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    marked = Repeated(found)
    last = {key: index for index, (key, _) in enumerate(pairs)}
    marked.dropped = [pair for index, pair in enumerate(pairs) if last[pair[0]] != index]
    return marked
