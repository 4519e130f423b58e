from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from steerserve.catalog import Catalog
from steerserve.errors import PolicyError
from steerserve.policy import Policy, parse_policy
from steerserve.policy.compiled import check_policies, compile_policies, distinct
from tests.unit.catalogs import make_catalog

ABLATE = {"sae": "jump", "feature": 3, "op": "ablate"}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return dataclasses.replace(make_catalog(tmp_path_factory.mktemp("saes")), policy_rows=64)


def policy(name: str = "p", mode: str = "enforce", **fields: Any) -> Policy:
    document = {"name": name, "version": 1, "mode": mode, "owner": "o", "reason": "r", **fields}
    return parse_policy(f"{name}.yaml", json.dumps(document).encode())


def test_an_enforced_ceiling_is_held_and_anything_else_is_forced(catalog: Catalog) -> None:
    entries = [
        ABLATE,
        {"sae": "jump", "feature": 4, "op": "at_most", "value": 1.0},
        {"sae": "jump", "feature": 5, "op": "clamp", "value": 1.0},
        {"then": "abort", "when": {"sae": "jump", "feature": 6, "above": 2}},
    ]
    rows = compile_policies([policy(interventions=entries)], catalog)["p"].rows
    assert [row.effect for row in rows] == ["hold", "hold", "force", "abort"]


def test_a_shadow_and_a_watch_only_observe(catalog: Catalog) -> None:
    watch = [{"name": "w", "sae": "jump", "feature": 7, "above": 1.5}]
    abort = {"then": "abort", "when": {"sae": "jump", "feature": 6, "above": 2}}
    found = compile_policies([policy(mode="shadow", interventions=[ABLATE, abort], watch=watch)], catalog)
    rows = found["p"].rows
    assert [row.effect for row in rows] == ["observe"] * 3
    assert not any(row.applies for row in rows)
    assert (rows[2].origin.watch, rows[2].c) == ("w", 1.5)


def test_a_policy_that_is_off_is_not_compiled(catalog: Catalog) -> None:
    assert compile_policies([policy(mode="off", interventions=[ABLATE])], catalog) == {}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"interventions": [ABLATE | {"sae": "nope"}]},
            r"policy `p`: .* got 'nope' - at \$\.interventions\[0\]",
        ),
        ({"interventions": [ABLATE | {"feature": 900}]}, r"`feature` < 128, got 900"),
        ({"watch": [{"name": "w", "direction": "south"}]}, r"`direction` to be one of .* at \$\.watch\[0\]"),
        ({"interventions": [ABLATE | {"op": "at_most", "value": 1, "unit": "max"}]}, "recorded maximum"),
    ],
)
def test_what_is_not_served_is_refused_by_name(catalog: Catalog, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        check_policies([policy(**fields)], catalog)


def test_two_policies_may_agree_on_a_feature_but_not_differ(catalog: Catalog) -> None:
    same = [policy("a", interventions=[ABLATE]), policy("b", interventions=[ABLATE])]
    check_policies(same, catalog)
    other = policy("b", interventions=[ABLATE | {"op": "clamp", "value": 1.0}])
    with pytest.raises(PolicyError, match=r"`b`: .* `a` changes sae:jump 3 otherwise"):
        check_policies([same[0], other], catalog)
    check_policies([same[0], policy("b", "shadow", interventions=[ABLATE])], catalog)


def test_more_than_fits_beside_a_request_is_refused(catalog: Catalog) -> None:
    watch = [{"name": f"w{i}", "sae": "jump", "feature": i} for i in range(65)]
    check_policies([policy(watch=watch[:64])], catalog)
    with pytest.raises(PolicyError, match="at most 64 features read at one hook point, got 65"):
        check_policies([policy(watch=watch)], catalog)


def test_a_feature_without_a_linear_encoder_cannot_be_held(catalog: Catalog) -> None:
    source = catalog.sources["sae:jump"]
    odd = dataclasses.replace(source, body=dataclasses.replace(source.body, normalisation="layer_norm"))
    strange = dataclasses.replace(catalog, sources={**catalog.sources, "sae:jump": odd})
    with pytest.raises(PolicyError, match="a linear encoder, for only that can be held"):
        check_policies([policy(interventions=[ABLATE])], strange)


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
def test_a_policy_changes_each_feature_once(catalog: Catalog, mode: str) -> None:
    twice = [ABLATE, ABLATE | {"op": "clamp", "value": 5.0}]
    with pytest.raises(PolicyError, match=r"expected each feature once.* \$\.interventions\[1\]"):
        check_policies([policy(mode=mode, interventions=twice)], catalog)


PROMPT, REPLY = {"where": {"phase": "prompt", "stop": -1}}, {"where": {"phase": "generation"}}


def test_a_policy_may_change_a_feature_otherwise_at_other_tokens(catalog: Catalog) -> None:
    apart = [ABLATE | PROMPT, ABLATE | REPLY | {"op": "at_most", "value": 5.0}]
    (one,) = compile_policies([policy(interventions=apart)], catalog).values()
    assert [(row.op, row.effect) for row in one.rows] == [("ablate", "hold"), ("at_most", "hold")]
    assert one.applied == {("sae:jump", 3): list(one.rows)}


def test_two_policies_may_change_a_feature_at_other_tokens_and_never_at_one(catalog: Catalog) -> None:
    first, clamp = policy(name="a", interventions=[ABLATE | PROMPT]), ABLATE | {"op": "clamp", "value": 5.0}
    second = policy(name="b", interventions=[ABLATE | PROMPT, clamp | REPLY])
    compiled = compile_policies([first, second], catalog)
    rows = distinct(row for one in compiled.values() for row in one.rows)
    assert sorted((row.op, row.window.phase) for row in rows) == [
        ("ablate", "prompt"),
        ("clamp", "generation"),
    ]
    meeting = policy(name="b", interventions=[clamp | {"where": {"positions": [1]}}])
    with pytest.raises(PolicyError, match=r"changes sae:jump 3 otherwise at position 1, with a prompt of"):
        compile_policies([first, meeting], catalog)


def test_a_ceiling_that_waits_for_a_condition_is_refused(catalog: Catalog) -> None:
    latched = ABLATE | {"latch": True, "when": {"feature": 4, "above": 1}}
    with pytest.raises(PolicyError, match="no `latch` beside an enforced `ablate`"):
        check_policies([policy(interventions=[latched])], catalog)
    check_policies([policy(mode="shadow", interventions=[latched])], catalog)


def test_a_direction_can_be_held(catalog: Catalog) -> None:
    check_policies([policy(interventions=[{"direction": "north", "op": "ablate"}])], catalog)


def test_a_committed_example_is_a_policy_of_the_demo() -> None:
    folder = Path(__file__).parents[3] / "examples" / "policies"
    assert [parse_policy(file.name, file.read_bytes()).name for file in sorted(folder.glob("*.yaml"))]
