"""Which names mean us, and that nobody else's do."""

from __future__ import annotations

import pytest

from steerserve.server.names import is_nearly, means_us
from tests.support.misplaced import SPELLINGS


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_way_to_write_our_names_is_known(name: str) -> None:
    assert means_us(name)


@pytest.mark.parametrize("word", ["steering", "interventions"])
def test_every_slip_of_one_letter_is_known(word: str) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    halves = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    slips = {a + b[1:] for a, b in halves if b}
    slips |= {a + b[1] + b[0] + b[2:] for a, b in halves if len(b) > 1}
    slips |= {a + letter + b for a, b in halves for letter in letters}
    slips |= {a + letter + b[1:] for a, b in halves for letter in letters if b}
    known = {slip for slip in slips if means_us(slip) and means_us(slip.upper()) and means_us(f"x_{slip}")}
    # All but what is another word already.
    assert slips - known <= {"sneering", "sheering", "steeling", "steeping", "peering"}
    assert len(known) > 400


@pytest.mark.parametrize(
    "name",
    ["string", "stop_string", "stop_strings", "settings", "streaming", "stream", "step", "starting", "seed",
     "score", "scoring", "sharing", "tier", "tiering", "engineering", "interactions", "intervals", "storing",
     "", "[]", "\u4f60\u597d", "x" * 10_000],
)  # fmt: skip
def test_other_words_are_other_words(name: str) -> None:
    assert not means_us(name)


def test_a_header_is_ours_by_the_whole_of_its_name() -> None:
    assert is_nearly("steering")
    assert is_nearly("Stering")
    assert not is_nearly("traffic-steering")
    assert not is_nearly("steerserve-version")
