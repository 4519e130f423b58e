"""Which bit of a token's mask means which row of a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.catalog import Catalog
from steerserve.compile import compile_plan
from steerserve.errors import RequestError
from steerserve.layout import MAX_BITS, Bits
from steerserve.plan import Plan
from steerserve.row import Gate, Row
from steerserve.spec import Where, parse_spec
from steerserve.window import Window, resolve
from tests.unit.windows import wheres

INF = float("inf")
VOCAB = 12
SPECIAL = np.arange(VOCAB) < 3
_position = st.integers(-6, 12)
_token = st.integers(0, VOCAB - 1)
_where = wheres(_position, _token, 3)
EARLIER, HERE = Gate("sae:std", 1, 0.0, INF, 2), Gate("sae:jump", 1, 0.0, INF, 3)


def _row(window: Window, gates: tuple[Gate, ...] = (), *, latch: bool = False, feature: int = 0) -> Row:
    return Row(3, "sae:jump", feature, "add", 1.0, 1.0, -INF, INF, gates, window, latch=latch)


@st.composite
def _plans(draw: st.DrawFn) -> Plan:
    windows = [Window.of(Where(**where)) for where in draw(st.lists(_where, min_size=1, max_size=4))]
    rows = [
        _row(
            draw(st.sampled_from(windows)),
            draw(st.sampled_from([(), (EARLIER,), (HERE,), (EARLIER, HERE)])),
            latch=draw(st.booleans()),
            feature=feature,
        )
        for feature in range(draw(st.integers(1, 20)))
    ]
    return Plan(tuple(rows), "digest")


@given(plan=_plans(), prompt_len=st.integers(1, 8), ids=st.lists(_token, min_size=1, max_size=16))
def test_a_rows_bits_are_its_own_window(plan: Plan, prompt_len: int, ids: list[int]) -> None:
    tokens = np.array(ids)
    masks = plan.selector(prompt_len).masks(0, tokens, SPECIAL)
    for number, row in enumerate(plan.rows):
        alone = resolve([row.window], prompt_len).masks(0, tokens, SPECIAL) & 1
        for bit in (plan.bits.row[number], plan.bits.condition[number]):
            assert ((masks >> bit) & 1).tolist() == alone.tolist()


@given(plan=_plans())
def test_a_bit_that_an_earlier_hook_point_clears_is_nobody_elses(plan: Plan) -> None:
    bits = plan.bits
    for number, row in enumerate(plan.rows):
        if not row.earlier:
            assert bits.condition[number] == bits.row[number]
            continue
        bit = bits.condition[number]
        others = [at for at in range(len(plan.rows)) if at != number]
        assert bit not in [bits.row[at] for at in others] + [bits.condition[at] for at in others]
        # A row that has latched stays, whatever becomes of the condition.
        assert (bits.row[number] == bit) is not row.latch


@given(plan=_plans())
def test_rows_of_one_window_share_a_bit_where_they_can(plan: Plan) -> None:
    plain = {row.window for row in plan.rows if row.latch or not row.earlier}
    asking = sum(bool(row.earlier) for row in plan.rows)
    assert len(plan.bits.windows) == len(plain) + asking
    assert max((*plan.bits.row, *plan.bits.condition)) < len(plan.bits.windows)


def test_no_rows_need_no_bits() -> None:
    assert Bits.of([]) == Bits((), (), ())


@pytest.fixture
def wide(catalog: Catalog) -> Catalog:
    """One that takes more interventions than a mask has bits."""
    return replace(catalog, max_interventions=100)


def _compiled(catalog: Catalog, interventions: list[dict[str, Any]]) -> Plan:
    return compile_plan(parse_spec({"interventions": interventions}), catalog)


def _different_windows(count: int) -> list[dict[str, Any]]:
    return [
        {"sae": "jump", "feature": at, "op": "ablate", "where": {"start": at, "stop": at + 1}}
        for at in range(count)
    ]


def test_as_many_windows_as_a_mask_has_bits_are_taken_and_one_more_is_refused(wide: Catalog) -> None:
    assert len(_compiled(wide, _different_windows(MAX_BITS)).bits.windows) == MAX_BITS
    with pytest.raises(RequestError, match="at most 64 different windows, got 65") as caught:
        _compiled(wide, _different_windows(MAX_BITS + 1))
    assert caught.value.param == "$.steering.interventions"


def test_questions_to_earlier_hook_points_take_bits_as_well(wide: Catalog) -> None:
    asking = {"when": {"sae": "std", "feature": 1, "above": 0.0}, "latch": True}
    interventions = [
        {"sae": "jump", "feature": at, "op": "ablate", **asking, "where": {"start": at // 33}}
        for at in range(MAX_BITS - 1)
    ]
    # Two windows, and a question of each row.
    with pytest.raises(RequestError, match="got 65"):
        _compiled(wide, interventions)
    assert len(_compiled(wide, interventions[:-1]).bits.windows) == MAX_BITS


def test_a_hundred_rows_of_one_window_take_one_bit(wide: Catalog) -> None:
    rows = [{"sae": "jump", "feature": at, "op": "ablate"} for at in range(100)]
    assert _compiled(wide, rows).bits.windows == (Window(),)
