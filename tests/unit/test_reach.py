"""What is said of all prompts is held to a look at every short one, token by token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.reach import can_match, meeting
from steerserve.spec import Where
from steerserve.window import Window
from tests.support.reference import touches
from tests.unit.windows import wheres

SPECIAL = frozenset({0, 1})
VOCAB = 4
LONGEST = 6
_position = st.integers(-7, 8)
_token = st.integers(0, VOCAB - 1)
_where = wheres(_position, _token, 3)


def _shared(*wheres: dict[str, Any]) -> list[tuple[int, int]]:
    """(prompt's length, position) at which some token is in all of the windows."""
    # More tokens than are ever excluded, as every vocabulary has.
    tokens = range(VOCAB + 3)
    return [
        (n, p)
        for n in range(1, LONGEST + 1)
        for p in range(LONGEST)
        if any(
            all(touches({"where": w}, p, [token] * LONGEST, n, SPECIAL) for w in wheres) for token in tokens
        )
    ]


@given(_where)
def test_a_window_can_match_exactly_if_it_does_in_some_prompt(where: dict[str, Any]) -> None:
    assert can_match(Window.of(Where(**where)), SPECIAL, LONGEST) is bool(_shared(where))


@given(_where, _where)
def test_two_windows_meet_exactly_where_some_token_is_in_both(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    found = meeting(Window.of(Where(**first)), Window.of(Where(**second)), SPECIAL, LONGEST)
    shared = _shared(first, second)
    assert (found is not None) is bool(shared)
    assert found is None or (found.prompt_len, found.position) in shared


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"phase": "prompt"}, {"phase": "generation"}, "the prompt's last token"),
        ({"phase": "prompt", "stop": -1}, {"phase": "generation"}, None),
        ({"phase": "prompt"}, {"phase": "generation", "start": 1}, None),
        ({"stop": 4}, {"start": 4}, None),
        ({"stop": 5}, {"start": 4}, "position 4"),
        ({"tokens": [5]}, {"exclude_tokens": [5]}, None),
        ({"tokens": [0], "special_tokens": True, "exclude_positions": [-1]}, {}, None),
        ({"tokens": [0], "special_tokens": True}, {}, "the prompt's last token"),
        ({"positions": [-1]}, {"exclude_positions": [-1]}, None),
        ({"positions": [-1]}, {"positions": [3]}, "the prompt's last token"),
        ({"positions": [-1]}, {"positions": [3], "phase": "prompt", "stop": -1}, "the prompt's last token"),
        ({"positions": [-1]}, {"start": 3, "stop": 4, "exclude_positions": [3]}, None),
        ({"positions": list(range(0, 8000, 2))}, {"positions": list(range(1, 8000, 2))}, None),
        ({"positions": list(range(200))}, {"start": 200}, None),
        ({"start": 0, "stop": 4000}, {"exclude_positions": list(range(4000))}, None),
        ({}, {}, "the prompt's last token"),
    ],
)
def test_without_a_known_length_windows_of_any_size_are_told_apart(
    first: dict[str, Any], second: dict[str, Any], said: str | None
) -> None:
    found = meeting(Window.of(Where(**first)), Window.of(Where(**second)), {0, 1, 2}, None)
    assert (str(found).partition(",")[0] if found else None) == said
