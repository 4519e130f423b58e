"""The expansion engine: tables of alternatives with nested ``{slots}``."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from random import Random

TABLES = Path(__file__).parent / "tables"
SLOT = re.compile(r"\{([a-z0-9 ]+)\}")
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])(?!one\b|uni|use|eu)")
# At least two returns from upper to lower case, or a digit inside: what encoded text has and words do not.
BASE64_TEXT = re.compile(
    r"(?<![\w+/])(?=[A-Za-z+/]*[0-9][A-Za-z0-9+/]|[A-Za-z+/]*[a-z][A-Z]+[a-z]+[A-Z])[A-Za-z0-9+/]{6,}={0,2}"
)

Table = Mapping[str, tuple[str, ...]]


def parse(text: str) -> dict[str, tuple[str, ...]]:
    """The table written in ``text``: ``[slot]`` headers, alternatives split by `` | `` or by lines."""
    slots: dict[str, list[str]] = {}
    current: list[str] | None = None
    for raw in text.splitlines():
        line = raw.strip()
        if re.fullmatch(r"\[[a-z0-9 ]+\]", line):
            current = slots.setdefault(line[1:-1], [])
        elif line and not line.startswith("#"):
            if current is None:
                raise ValueError(f"expected a [slot] header before any alternative, got {line!r}")
            current.extend(part.strip() for part in line.split(" | "))
    return {slot: tuple(alternatives) for slot, alternatives in slots.items()}


@cache
def load(name: str) -> Table:
    """The table in ``tables/<name>.txt``, alone."""
    return parse((TABLES / f"{name}.txt").read_text(encoding="utf-8"))


@cache
def load_with_shared(name: str) -> Table:
    """The domain's table over the shared one; where both have a slot, the domain's wins."""
    return {**load("shared"), **load(name)}


def _base64(table: Table, rng: Random) -> str:
    # Mostly encoded words, so that there is something in it for a model to learn; sometimes pure noise.
    if rng.random() < 0.1:
        plain = rng.randbytes(rng.randint(7, 14))
    else:
        plain = " ".join(rng.choices(table["plaintext"], k=rng.choice((1, 2, 2)))).encode()
    return base64.b64encode(plain).decode()


BUILTINS: Mapping[str, Callable[[Table, Random], str]] = {
    "integer": lambda table, rng: str(rng.randint(2, 99)),
    "braces": lambda table, rng: "{}",
    "base64": _base64,
}


def expand(template: str, table: Table, rng: Random) -> str:
    """``template`` with every slot replaced, recursively, by a random alternative of its table.

    Raises: KeyError if a slot is neither in the table nor built in.
    """

    def fill(match: re.Match[str]) -> str:
        slot = match.group(1)
        if slot in BUILTINS:
            return BUILTINS[slot](table, rng)
        return expand(rng.choice(table[slot]), table, rng)

    return SLOT.sub(fill, template)


def polish(text: str) -> str:
    """Prose with a/an agreed and its first word capitalised, unless that is a formula or a code word."""
    text = ARTICLE.sub(r"\1n ", text)
    first = re.match(r"[a-z]+(?=[ ,:-])", text)
    if first and (len(first.group()) > 1 or first.group() == "a"):
        text = text[0].upper() + text[1:]
    return text
