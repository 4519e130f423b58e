from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from steerserve.spec import Where
from steerserve.tokens import Batch, TokenMap
from steerserve.window import Window, resolve
from tests.support.reference import touches
from tests.unit.windows import wheres

SPECIAL = frozenset({0, 1, 2})
VOCAB = 12
_position = st.integers(-12, 24)
_token = st.integers(0, VOCAB - 1)
_where = wheres(_position, _token, 4)


@given(
    wheres=st.lists(_where, min_size=1, max_size=4),
    prompt=st.lists(_token, min_size=1, max_size=14),
    generated=st.lists(_token, max_size=8),
    cuts=st.lists(st.integers(0, 22), max_size=4),
)
def test_rows_apply_where_the_documentation_says_however_the_tokens_are_chunked(
    wheres: list[dict[str, Any]], prompt: list[int], generated: list[int], cuts: list[int]
) -> None:
    ids = prompt + generated
    windows = [Window.of(Where(**where)) for where in wheres]
    selector = resolve(windows, len(prompt))
    special = np.zeros(VOCAB, dtype=np.bool_)
    special[list(SPECIAL)] = True
    expected = [
        sum(touches({"where": w}, p, ids, len(prompt), SPECIAL) << i for i, w in enumerate(wheres))
        for p in range(len(ids))
    ]
    assert selector.masks(0, np.array(ids), special).tolist() == expected

    tokens = TokenMap(64, special)
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    for start, stop in itertools.pairwise(edges):
        layout = Batch.of([-1, 5], [None, selector])
        scheduled = np.array([2, stop - start], dtype=np.int32)
        computed = np.array([0, start], dtype=np.int32)
        count = tokens.fill(layout, scheduled, computed, np.array([3, 3, *ids[start:stop]], dtype=np.int32))
        got = dict(zip(tokens.position[:count].tolist(), tokens.rows[:count].tolist(), strict=True))
        assert got == {p: expected[p] for p in range(start, stop) if expected[p]}
        assert set(tokens.owner[:count].tolist()) <= {1}


@given(_where)
def test_a_window_survives_the_wire(where: dict[str, Any]) -> None:
    window = Window.of(Where(**where))
    assert Window.from_wire(window.wire) == window


def test_sixty_four_rows_have_a_bit_each() -> None:
    windows = [Window(positions=(i,)) for i in range(64)]
    masks = resolve(windows, 4).masks(0, np.full(64, 5), np.zeros(1, dtype=np.bool_))
    assert [mask & (2**64 - 1) for mask in masks.tolist()] == [1 << i for i in range(64)]
