"""Values in raw units, rows of one feature, and names that are not served."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steerserve.catalog import Catalog
from steerserve.compile import compile_plan
from steerserve.errors import RequestError
from steerserve.plan import Plan
from steerserve.spec import parse_spec

A = {"sae": "jump", "feature": 3, "op": "clamp", "value": 2.0}
B = {"sae": "gate", "feature": 5, "op": "ablate"}
NORTH = {"direction": "north", "op": "add", "unit": "max"}


def _plan(catalog: Catalog, *interventions: dict[str, Any]) -> Plan:
    return compile_plan(parse_spec({"interventions": list(interventions)}), catalog)


@pytest.mark.parametrize("value", [1e6 / 12, -1e6 / 12])
def test_a_multiple_of_the_maximum_may_be_as_large_as_a_raw_value(catalog: Catalog, value: float) -> None:
    assert abs(_plan(catalog, NORTH | {"value": value}).rows[0].c) == pytest.approx(1e6)


@pytest.mark.parametrize("value", [1e5, -1e6])
def test_the_bound_of_a_value_holds_in_raw_units(catalog: Catalog, value: float) -> None:
    wanted = r"expected `value` from -83333.3 to 83333.3, .*maximum of 12 .*±1e\+06 raw units, got -?1"
    with pytest.raises(RequestError, match=wanted) as caught:
        _plan(catalog, NORTH | {"value": value})
    assert caught.value.param == "$.steering.interventions[0].value"


@pytest.mark.parametrize("maximum", [0.0, -3.0])
def test_there_are_no_multiples_of_a_maximum_that_is_not_above_zero(catalog: Catalog, maximum: float) -> None:
    north = catalog.sources["direction:north"]
    body: Any = north.body
    silent = replace(north, body=replace(body, statistics={"max_activation": maximum}))
    known = replace(catalog, sources=catalog.sources | {north.key: silent})
    with pytest.raises(RequestError, match=f"activation of this feature is {maximum:g}, of which") as caught:
        _plan(known, NORTH | {"value": 1.0})
    assert caught.value.param == "$.steering.interventions[0].unit"


def _within(value: float, **where: Any) -> dict[str, Any]:
    return A | {"value": value, "where": where}


def test_a_feature_may_have_one_value_in_the_prompt_and_another_in_the_generation(catalog: Catalog) -> None:
    first, second = _within(1.0, phase="prompt", stop=-1), _within(2.0, phase="generation")
    plan = _plan(catalog, first, second)
    assert sorted((row.c, row.origin.index) for row in plan.rows) == [(1.0, 0), (2.0, 1)]
    assert plan.digest == _plan(catalog, second, first).digest
    swapped = _plan(catalog, _within(2.0, phase="prompt", stop=-1), _within(1.0, phase="generation"))
    assert swapped.digest != plan.digest
    masks = plan.selector(4).masks(0, np.full(6, 9), np.zeros(1, dtype=np.bool_)).tolist()
    bit = {row.c: 1 << plan.bits.row[number] for number, row in enumerate(plan.rows)}
    assert masks == [bit[1.0]] * 3 + [bit[2.0]] * 3


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"phase": "prompt"}, {"phase": "generation"}, r"at the prompt's last token, .*`stop: -1`"),
        ({}, {}, "at the prompt's last token - at"),
        ({"start": 2}, {"stop": 3}, "at position 2, with a prompt of 1 token - at"),
        ({"tokens": [5, 6]}, {"tokens": [6]}, "at the prompt's last token"),
        ({"phase": "generation"}, {"tokens": [6], "phase": "all"}, "at the prompt's last token"),
    ],
)
def test_rows_of_one_feature_that_would_meet_are_refused_with_where(
    catalog: Catalog, first: dict[str, Any], second: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestError, match=r"expected each feature once at each token.*" + said) as caught:
        _plan(catalog, B, _within(1.0, **first), _within(2.0, **second))
    assert caught.value.param == "$.steering.interventions[2]"
    assert "the one of interventions[1] again" in str(caught.value)
    assert caught.value.reason == "duplicate"


@pytest.mark.parametrize(
    ("intervention", "said"),
    [
        (A | {"feature": "758"}, "an index, which is a number, .* got the string '758'; did you mean 758, w"),
        (A | {"feature": "a label"}, "expected a feature index, got 'a label': SAE `jump` has no labels"),
        ({"feature": 1, "op": "ablate"}, "expected `sae`, one of 'jump', 'gate', 'std', which is missing"),
        (A | {"sae": "jumq"}, "expected `sae` to be one of 'jump', .*got 'jumq'; did you mean 'jump'?"),
        ({"direction": "south", "op": "ablate"}, "to be one of 'north', got 'south'"),
    ],
)
def test_a_name_that_is_not_served_is_told_what_is(
    catalog: Catalog, intervention: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        _plan(catalog, intervention)


@pytest.mark.parametrize(
    ("intervention", "option"),
    [
        ({"direction": "south", "op": "ablate"}, "--direction NAME=PATH"),
        ({"sae": "x", "feature": 1, "op": "ablate"}, "--sae NAME=PATH"),
        ({"feature": 1, "op": "ablate"}, "--sae NAME=PATH"),
    ],
)
def test_a_server_that_serves_none_says_how_to_add_one(
    catalog: Catalog, intervention: dict[str, Any], option: str
) -> None:
    with pytest.raises(RequestError, match=rf"is served here \(the operator adds one: .*{option}") as caught:
        _plan(replace(catalog, sources={}), intervention)
    assert "[]" not in str(caught.value)
