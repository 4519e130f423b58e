from __future__ import annotations

from typing import Any

import msgspec
import pytest

from steerserve.catalog import Catalog
from steerserve.errors import RequestError
from steerserve.plan import Plan, compile_plan
from steerserve.spec import parse_spec

A = {"sae": "jump", "feature": 3, "op": "clamp", "value": 2.0}
B = {"sae": "gate", "feature": 5, "op": "ablate"}
WHEN = {"when": [{"feature": 6, "above": 1.0}, {"sae": "gate", "feature": 1, "below": 2.0}]}


def _plan(catalog: Catalog, *interventions: dict[str, Any], **more: Any) -> Plan:
    return compile_plan(parse_spec({"interventions": list(interventions), **more}), catalog)


def test_order_does_not_matter_to_the_digest_and_everything_else_does(catalog: Catalog) -> None:
    assert _plan(catalog, A, B) == _plan(catalog, B, A)
    different = [
        _plan(catalog, A),
        _plan(catalog, A | {"value": 2.5}),
        _plan(catalog, A | {"feature": 4}),
        _plan(catalog, A | {"where": {"phase": "prompt"}}),
        _plan(catalog, A | WHEN),
        _plan(catalog, A | {"only_if_active": True}),
        _plan(catalog, A, B),
    ]
    assert len({plan.digest for plan in different}) == len(different)


def test_a_plan_survives_the_wire_it_travels_on(catalog: Catalog) -> None:
    plan = _plan(catalog, A | WHEN, B | {"where": {"tokens": [5], "start": -3}})
    assert Plan.from_wire(msgspec.msgpack.decode(msgspec.msgpack.encode(plan.wire))) == plan


def test_unit_max_means_multiples_of_the_recorded_maximum(catalog: Catalog) -> None:
    plan = _plan(catalog, {"direction": "north", "op": "add", "unit": "max", "value": 0.5})
    assert plan.rows[0].c == 6.0


@pytest.mark.parametrize(
    ("interventions", "more", "param"),
    [
        ([A | {"sae": "nope"}], {}, "interventions[0].sae"),
        ([{"feature": 1, "op": "ablate"}], {}, "interventions[0].sae"),
        ([B, A | {"feature": 128}], {}, "interventions[1].feature"),
        ([A | {"feature": "a label"}], {}, "interventions[0].feature"),
        ([{"direction": "south", "op": "ablate"}], {}, "interventions[0].direction"),
        ([A, B, A], {}, "interventions[2]"),
        ([{"sae": "std", "feature": 1, "op": "ablate", "when": {"sae": "jump", "feature": 1, "above": 0}}], {}, "interventions[0].when"),
        ([A | {"when": {"feature": 900, "above": 0}}], {}, "interventions[0].when.feature"),
        ([A | {"where": {"tokens": [0]}}], {}, "interventions[0].where.tokens"),
        ([A | {"feature": i} for i in range(17)], {}, "interventions"),
        ([A], {"error": "drop"}, "error"),
        ([A | {"unit": "max"}], {}, "interventions[0].unit"),
    ],
)
def test_what_cannot_be_honoured_exactly_is_refused_by_name(
    catalog: Catalog, interventions: list[dict[str, Any]], more: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        _plan(catalog, *interventions, **more)
    assert caught.value.param == f"$.steering.{param}"


def test_more_conditions_than_a_slot_can_read_are_refused(catalog: Catalog) -> None:
    many = [
        A | {"feature": i, "when": [{"feature": 64 + 3 * i + j, "above": 0.0} for j in range(3)]}
        for i in range(16)
    ]
    with pytest.raises(RequestError, match="at most 32 features read"):
        _plan(catalog, *many)
