"""Which names mean steering: as it is written, as others write it, and with a slip of the finger."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

__all__ = ["is_nearly", "means_us", "resembles_us"]

# No field of vLLM holds one of these; a name that does was meant for us.
_STEMS = ("steer", "intervention")
# A name as near as this, in edits, to one of these words is taken for it.
_NEAR = {"steering": 2, "steer": 1, "interventions": 2, "intervention": 2}
# As near, and words in their own right.
_OTHER_WORDS = {
    "jeering", "leering", "peering", "seeding", "seeing", "seeking", "seeming", "seeping", "sheering",
    "sneering", "staring", "steaming", "steed", "steel", "steeling", "steep", "steeping", "sterling",
    "stewing", "stirring", "storing", "string", "tiering", "veering",
}  # fmt: skip
_LETTERS = [(set(word), most) for word, most in _NEAR.items()]
# Beyond, only what a name holds is looked at; nor is it remembered, lest clients fill the memory.
_LONGEST = 64


def means_us(name: str) -> bool:
    """Whether a key is meant for us: it holds `steer` or `intervention`, or a misspelling of them.

    Case, separators and the width of letters do not matter; each word of a name counts, as in
    `x-Steerring` and `featureStering`.
    """
    return _means_us(name) if len(name) <= _LONGEST else _holds_us(name.casefold())


def is_nearly(name: str) -> bool:
    """Whether a name is one of our words or a misspelling of one, and nothing else."""
    return len(name) <= _LONGEST and _is_near(_words(name)[0])


def resembles_us(name: str) -> bool:
    """Whether a name has so many of our letters that it takes time to tell; most names have not."""
    return not name.isdigit() and (not name.isascii() or _has_letters(set(name.lower())))


@lru_cache(maxsize=4096)
def _means_us(name: str) -> bool:
    if not resembles_us(name):
        return False
    whole, *words = _words(name)
    return _holds_us(whole) or any(_is_near(word) for word in (whole, *words))


def _holds_us(name: str) -> bool:
    return any(stem in name for stem in _STEMS)


def _words(name: str) -> list[str]:
    """The name's letters and digits in lower case, and those of each of its words."""
    plain = unicodedata.normalize("NFKC", name)
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", plain).casefold()
    words = re.findall(r"[a-z0-9]+", split)
    return ["".join(words), *words]


def _is_near(word: str) -> bool:
    if word in _OTHER_WORDS:
        return False
    return _has_letters(set(word)) and any(
        abs(len(word) - len(ours)) <= most and _is_within(most, word, ours) for ours, most in _NEAR.items()
    )


def _has_letters(letters: set[str]) -> bool:
    """Whether a near word can have these letters: an edit takes one of ours at most."""
    return any(len(own - letters) <= most for own, most in _LETTERS)


def _is_within(most: int, a: str, b: str) -> bool:
    """Whether so many letters left out, added, replaced or swapped with their neighbour lead from a to b.

    The optimal string alignment distance (Damerau 1964, without edits inside of swapped pairs).
    """
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other)))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
        if min(before) > most < min(last):
            return False
    return last[-1] <= most
