"""Windows that can match nothing at all, or nothing of one prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from steerserve.catalog import Catalog
from steerserve.compile import compile_plan
from steerserve.errors import RequestError
from steerserve.plan import Plan
from steerserve.spec import parse_spec
from steerserve.unmatched import unmatched_in

A = {"sae": "jump", "feature": 3, "op": "clamp", "value": 2.0}
B = {"sae": "gate", "feature": 5, "op": "ablate"}
ABORT = {"then": "abort", "when": {"sae": "jump", "feature": 1, "above": 0.0}}


@pytest.fixture
def known(catalog: Catalog) -> Catalog:
    """One of a model of 320 token ids and sequences of 64 tokens."""
    return replace(catalog, vocab=320, max_len=64)


def _plan(catalog: Catalog, *interventions: dict[str, Any]) -> Plan:
    return compile_plan(parse_spec({"interventions": list(interventions)}), catalog)


@pytest.mark.parametrize("intervention", [A, ABORT], ids=["edit", "abort"])
@pytest.mark.parametrize(
    ("where", "param", "said"),
    [
        (
            {"tokens": [5, 320]},
            ".tokens[1]",
            "expected a token id < 320, the size of the vocabulary, got 320",
        ),
        ({"exclude_tokens": [999_999]}, ".exclude_tokens[0]", "expected a token id < 320"),
        ({"start": 5, "stop": 3}, "", "expected `start` < `stop`, got 5 and 3: that leaves no position"),
        ({"start": -2, "stop": -2}, "", "expected `start` < `stop`, got -2 and -2"),
        ({"start": 64}, "", "in a sequence of 64 tokens, the model's length, got `start` 64"),
        ({"phase": "generation", "stop": -1}, "", "`stop` -1: negative numbers count from the prompt's end"),
        ({"phase": "generation", "start": 2, "stop": -1}, "", "got `start` 2 and `stop` -1"),
        (
            {"positions": [1, 64]},
            ".positions[1]",
            "a position that `phase` 'all' can have in a sequence of 64",
        ),
        ({"positions": [-65]}, ".positions[0]", "got -65"),
        ({"phase": "generation", "positions": [-2]}, ".positions[0]", "`phase` 'generation' can have"),
        ({"exclude_positions": [64]}, ".exclude_positions[0]", "expected a position that a request can have"),
        ({"positions": [3], "exclude_positions": [3]}, "", "got one that excludes all that it includes"),
        ({"tokens": [5], "exclude_tokens": [5]}, "", "got one that excludes all that it includes"),
    ],
)
def test_a_window_that_can_match_nothing_is_refused(
    known: Catalog, intervention: dict[str, Any], where: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(RequestError) as caught:
        _plan(known, {**intervention, "where": where})
    assert said in str(caught.value)
    assert caught.value.param == f"$.steering.interventions[0].where{param}"


@pytest.mark.parametrize(
    "where", [{"tokens": [319]}, {"start": 63}, {"positions": [63, -64]}, {"start": -64, "stop": 1}]
)
def test_a_window_that_some_prompt_has_is_taken(known: Catalog, where: dict[str, Any]) -> None:
    assert _plan(known, A | {"where": where}).rows


@pytest.mark.parametrize(
    ("where", "missed"),
    [
        ({}, False),
        ({"phase": "prompt"}, False),
        ({"phase": "prompt", "start": 4}, True),
        ({"start": 4, "stop": 6}, False),
        ({"start": 6}, True),
        ({"tokens": [9], "phase": "prompt"}, True),
        ({"tokens": [9]}, False),
        ({"tokens": [5]}, False),
        ({"positions": [0], "phase": "prompt"}, True),
        ({"positions": [0], "special_tokens": True}, False),
        ({"positions": [5, 6]}, False),
        ({"positions": [6]}, True),
        ({"positions": [-5]}, True),
    ],
)
def test_a_window_that_matches_nothing_of_one_prompt_nor_of_its_reply_is_known(
    known: Catalog, where: dict[str, Any], missed: bool
) -> None:
    """Four tokens, of which the first is special; of a reply of three the model reads two."""
    plan = _plan(known, B, A | {"where": where})
    assert list(unmatched_in(plan, [0, 5, 6, 7], 3, known)) == ([1] if missed else [])


def test_a_reply_without_a_limit_may_reach_any_position(known: Catalog) -> None:
    plan = _plan(known, A | {"where": {"start": 60}})
    assert list(unmatched_in(plan, [0, 5, 6, 7], None, known)) == []
