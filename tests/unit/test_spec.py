from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.errors import RequestError
from steerserve.spec import parse_spec, parse_spec_json

GOOD = {"sae": "jump", "feature": 1, "op": "clamp", "value": 1.0}


def _refusal(value: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_spec(value)
    return caught.value


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"value": True}, "value"),
        ({"value": float("nan")}, "value"),
        ({"value": float("inf")}, "value"),
        ({"value": "1"}, "value"),
        ({"value": 10**400}, "value"),
        ({"feature": 1.5}, "feature"),
        ({"feature": True}, "feature"),
        ({"feature": -1}, "feature"),
        ({"feature": ""}, "feature"),
        ({"op": "explode"}, "op"),
        ({"unit": "percent"}, "unit"),
        ({"feture": 2}, "feture"),
        ({"where": {"phase": "later"}}, "where.phase"),
        ({"where": {"positions": ["a"]}}, "where.positions[0]"),
        ({"where": {"positions": []}}, "where.positions"),
        ({"where": {"stp": 1}}, "where.stp"),
        ({"when": {"feature": 1}}, "when"),
        ({"when": [{"feature": 1, "above": True}]}, "when[0].above"),
        ({"only_if_active": 1}, "only_if_active"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(changed: dict[str, Any], param: str) -> None:
    error = _refusal({"interventions": [GOOD | changed]})
    assert error.param == f"$.steering.interventions[0].{param}"
    assert str(error).endswith(f"- at {error.param}")


@pytest.mark.parametrize(
    "intervention",
    [
        {"op": "ablate"},
        {"op": "ablate", "feature": 1, "direction": "north"},
        {"op": "ablate", "direction": "north", "sae": "jump"},
        {"op": "ablate", "feature": 1, "value": 0.0},
        {"op": "clamp", "feature": 1},
        {"op": "scale", "feature": 1, "value": 2.0, "unit": "max"},
    ],
)
def test_fields_that_do_not_belong_together_are_refused(intervention: dict[str, Any]) -> None:
    assert _refusal({"interventions": [intervention]}).param == "$.steering.interventions[0]"


@pytest.mark.parametrize("value", [None, [], "x", 3, True, {}, {"interventions": {}}, {"interventions": [1]}])
def test_what_is_not_a_steering_object_is_refused(value: Any) -> None:
    assert _refusal(value).param.startswith("$.steering")


@pytest.mark.parametrize(
    "text",
    [
        '{"interventions": [{"feature": 1, "op": "clamp", "value": NaN}]}',
        '{"interventions": [{"feature": 1, "op": "clamp", "value": -Infinity}]}',
        '{"interventions": [], "interventions": []}',
        "{",
        "[" * 100_000,
        '{"interventions": []}' + " " * 300_000,
    ],
)
def test_json_that_is_ambiguous_broken_or_huge_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        parse_spec_json(text)


def test_a_whole_number_is_a_fine_value() -> None:
    spec = parse_spec_json(json.dumps({"interventions": [GOOD | {"value": 3}]}))
    assert spec.interventions[0].value == 3.0


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_keys = st.sampled_from(
    ["sae", "feature", "op", "value", "unit", "where", "when", "direction", "phase", "tokens", "above"]
)
_near = st.fixed_dictionaries(
    {"interventions": st.lists(st.dictionaries(_keys, _json, max_size=6), max_size=3)}
)


@given(_json | _near)
def test_any_value_is_parsed_or_refused_with_a_place(value: Any) -> None:
    refused = None
    try:
        parse_spec(value)
    except RequestError as error:
        refused = error
    if refused is not None:
        assert refused.param.startswith("$.steering")
        # One sentence of ours: what was expected, what came (or did not), and where.
        assert SENTENCE.fullmatch(str(refused))


# What pydantic says of a type that has no words of its own here would stand in brackets.
SENTENCE = re.compile(r"expected [^\n(]*(got [^\n]*|which [^\n]*) - at \$\.steering[^\n]*")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"feature": ""}, 'expected `feature` to be an index or a label, got ""'),
        ({"sae": ""}, 'expected `sae` not to be empty, got ""'),
        ({"sae": "x" * 200}, "expected `sae` of at most 128 characters, got"),
        ({"direction": "x", "sae": None}, "expected exactly one of `feature` and `direction`, got both"),
        ({"feature": None}, "expected exactly one of `feature` and `direction`, got neither"),
        (
            {"op": None},
            "expected `op`, one of clamp, ablate, scale, add, at_least, at_most, which is missing",
        ),
        ({"when": {"feature": 2}}, "expected `above` or `below`, a bound on the feature, got neither"),
        ({"where": {3: 4}}, "expected keys that are strings, got 3"),
        ({"sae": "\ud800"}, "expected `sae` to be a string of valid Unicode"),
    ],
)
def test_every_kind_of_fault_is_one_sentence_of_our_own(changed: dict[str, Any], says: str) -> None:
    refused = _refusal({"interventions": [GOOD | changed]})
    assert says in str(refused)
    assert SENTENCE.fullmatch(str(refused))
