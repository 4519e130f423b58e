from dataclasses import replace
from typing import Any

import pytest

from steerserve.access.limits import Limits
from steerserve.access.permission import check_limits, check_may_steer, check_scope
from steerserve.access.principal import ANYONE, NOBODY, Principal
from steerserve.catalog import Catalog
from steerserve.compile import compile_plan
from steerserve.errors import ForbiddenError
from steerserve.row import Row
from steerserve.spec import parse_spec

CLAMP = {"sae": "jump", "feature": 3, "op": "clamp", "value": 2.0}
ABLATE = {"sae": "gate", "feature": 5, "op": "ablate"}
NORTH = {"direction": "north", "op": "add", "value": 4.0}


def rows(catalog: Catalog, *interventions: dict[str, Any]) -> tuple[Row, ...]:
    return compile_plan(parse_spec({"interventions": list(interventions)}), catalog).rows


def held_to(limits: dict[str, Any]) -> Principal:
    return Principal("team", frozenset({"infer", "steer"}), Limits.model_validate(limits))


def refused(catalog: Catalog, limits: dict[str, Any], *interventions: dict[str, Any]) -> str:
    with pytest.raises(ForbiddenError) as caught:
        check_limits(held_to(limits), rows(catalog, *interventions), catalog)
    assert caught.value.status == 403
    assert caught.value.param == "$.steering.interventions"
    assert "key `team`" in str(caught.value)
    return str(caught.value)


def passes(catalog: Catalog, limits: dict[str, Any], *interventions: dict[str, Any]) -> None:
    check_limits(held_to(limits), rows(catalog, *interventions), catalog)


@pytest.mark.parametrize("scope", ["infer", "steer", "inspect", "admin"])
def test_no_scope_implies_another(scope: str) -> None:
    holder = Principal("team", frozenset({scope}))
    check_scope(holder, scope, "x")
    for other in {"infer", "steer", "inspect", "admin"} - {scope}:
        with pytest.raises(ForbiddenError, match=f"scope `{other}` for x, got `team` with {scope}"):
            check_scope(holder, other, "x")


def test_steering_needs_its_scope() -> None:
    check_may_steer(ANYONE)
    with pytest.raises(ForbiddenError, match=r"scope `steer`.*got `nobody` with none"):
        check_may_steer(NOBODY)
    with pytest.raises(ForbiddenError):
        check_may_steer(Principal("team", frozenset({"infer", "inspect", "admin"})))


def test_without_limits_everything_passes(catalog: Catalog) -> None:
    check_limits(ANYONE, rows(catalog, CLAMP, ABLATE, NORTH), catalog)


@pytest.mark.parametrize(
    "limits",
    [
        {"saes": ["jump", "gate", "direction:north"]},
        {"ops": ["clamp", "ablate", "add"]},
        {"saes": ["jump", "gate", "direction:north"], "features": {"jump": [[3, 4]]}},
        {"max_value": 4.0},
        {"max_interventions": 3},
    ],
)
def test_what_lies_within_the_limits_passes(catalog: Catalog, limits: dict[str, Any]) -> None:
    passes(catalog, limits, CLAMP, ABLATE, NORTH)


def test_the_interventions_beyond_a_limit_are_named_and_no_other(catalog: Catalog) -> None:
    said = refused(catalog, {"saes": ["jump"]}, CLAMP, ABLATE, NORTH)
    assert "`saes`" in said
    assert "(jump)" in said
    assert "ablate gate[5]" in said
    assert "add direction:north" in said
    assert "clamp" not in said


def test_a_direction_is_named_with_its_prefix(catalog: Catalog) -> None:
    passes(catalog, {"saes": ["direction:north"]}, NORTH)
    refused(catalog, {"saes": ["north"]}, NORTH)


def test_an_empty_list_allows_nothing(catalog: Catalog) -> None:
    assert "(none)" in refused(catalog, {"saes": []}, CLAMP)
    assert "(none)" in refused(catalog, {"ops": []}, CLAMP)
    assert "jump[3]" in refused(catalog, {"features": {"jump": []}}, CLAMP)
    refused(catalog, {"features": {}}, NORTH)


ABORT = {"then": "abort", "when": {"sae": "jump", "feature": 3, "above": 1.0}}


def test_ending_a_request_is_an_op_of_its_own(catalog: Catalog) -> None:
    passes(catalog, {"ops": ["abort"]}, ABORT)
    passes(catalog, {"ops": ["clamp", "abort"], "max_value": 2.0}, CLAMP, ABORT)
    assert "got abort jump[3]" in refused(catalog, {"ops": ["clamp"]}, CLAMP, ABORT)
    assert "got clamp jump[3]" in refused(catalog, {"ops": ["abort"]}, CLAMP, ABORT)
    # What it waits for tells where a feature is active.
    assert "abort jump[3]" in refused(catalog, {"ops": ["abort"], "saes": ["gate"]}, ABORT)
    assert "abort jump[3]" in refused(catalog, {"features": {"jump": [[4, 9]]}}, ABORT)


def test_ops_are_limited_by_name(catalog: Catalog) -> None:
    said = refused(catalog, {"ops": ["ablate"]}, CLAMP, ABLATE)
    assert "`ops`" in said
    assert "clamp jump[3]" in said


@pytest.mark.parametrize(("feature", "fine"), [(0, True), (9, True), (10, False), (19, False), (20, True)])
def test_feature_ranges_are_half_open(catalog: Catalog, feature: int, fine: bool) -> None:
    limits = {"features": {"jump": [[0, 10], [20, 21]]}}
    wanted = CLAMP | {"feature": feature}
    if fine:
        passes(catalog, limits, wanted)
    else:
        assert f"clamp jump[{feature}]" in refused(catalog, limits, wanted)


def test_features_alone_shut_every_other_sae_and_direction(catalog: Catalog) -> None:
    limits = {"features": {"jump": [[0, 100]]}}
    passes(catalog, limits, CLAMP)
    refused(catalog, limits, ABLATE)
    refused(catalog, limits, NORTH)


def test_features_narrow_an_sae_among_others(catalog: Catalog) -> None:
    limits = {"saes": ["jump", "gate"], "features": {"jump": [[0, 3]]}}
    passes(catalog, limits, ABLATE)
    refused(catalog, limits, CLAMP)


def test_a_condition_reads_and_is_limited_too(catalog: Catalog) -> None:
    when = CLAMP | {"when": {"feature": 6, "above": 1.0}}
    passes(catalog, {"features": {"jump": [[0, 10]]}}, when)
    assert "clamp jump[3] when jump[6]" in refused(catalog, {"features": {"jump": [[0, 5]]}}, when)
    elsewhere = CLAMP | {"when": {"sae": "gate", "feature": 6, "above": 1.0}}
    assert "when gate[6]" in refused(catalog, {"saes": ["jump"]}, elsewhere)


@pytest.mark.parametrize(
    ("op", "value", "fine"),
    [
        ("clamp", 5.0, True),
        ("clamp", -5.0, True),
        ("clamp", 5.1, False),
        ("clamp", -5.1, False),
        ("add", 5.0, True),
        ("add", -6.0, False),
        ("at_least", 5.0, True),
        ("at_least", 6.0, False),
        ("at_least", -6.0, False),
        ("at_most", -5.0, True),
        ("at_most", 6.0, False),
        ("scale", 5.0, True),
        ("scale", 5.5, False),
        ("scale", -5.5, False),
        ("ablate", None, True),
    ],
)
def test_the_largest_value_holds_for_every_op(
    catalog: Catalog, op: str, value: float | None, fine: bool
) -> None:
    wanted = {"sae": "jump", "feature": 3, "op": op, "value": value}
    if fine:
        passes(catalog, {"max_value": 5.0}, wanted)
    else:
        assert f"{op} jump[3] to {abs(value or 0):g}" in refused(catalog, {"max_value": 5.0}, wanted)


def test_a_largest_value_of_zero_still_lets_features_be_ablated(catalog: Catalog) -> None:
    passes(catalog, {"max_value": 0.0}, ABLATE)
    refused(catalog, {"max_value": 0.0}, NORTH | {"value": 0.001})


def test_a_value_in_multiples_of_the_maximum_counts_as_what_it_resolves_to(catalog: Catalog) -> None:
    half = NORTH | {"unit": "max", "value": 0.5}
    passes(catalog, {"max_value": 6.0}, half)
    assert "to 6" in refused(catalog, {"max_value": 5.9}, half)


def test_a_value_that_is_no_number_is_beyond_any_limit(catalog: Catalog) -> None:
    (row,) = rows(catalog, CLAMP)
    for broken in ({"c": float("nan")}, {"lo": float("nan")}, {"c": float("inf")}):
        with pytest.raises(ForbiddenError, match="max_value"):
            check_limits(held_to({"max_value": 5.0}), [replace(row, **broken)], catalog)


def test_interventions_are_counted(catalog: Catalog) -> None:
    passes(catalog, {"max_interventions": 2}, CLAMP, ABLATE)
    assert "got 2 interventions" in refused(catalog, {"max_interventions": 1}, CLAMP, ABLATE)
    refused(catalog, {"max_interventions": 0}, CLAMP)
    check_limits(held_to({"max_interventions": 0}), [], catalog)


def test_a_long_list_of_offenders_is_cut(catalog: Catalog) -> None:
    said = refused(catalog, {"ops": []}, *(CLAMP | {"feature": index} for index in range(12)))
    assert said.count("clamp jump[") == 8
    assert "…" in said
