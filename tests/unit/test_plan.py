from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from steerserve.catalog import Catalog
from steerserve.compile import compile_plan
from steerserve.errors import RequestError
from steerserve.plan import Plan, build_plan
from steerserve.row import Effect, Origin
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
        (
            [{"sae": "std", "feature": 1, "op": "ablate", "when": {"sae": "jump", "feature": 1, "above": 0}}],
            {},
            "interventions[0].when",
        ),
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


EARLIER = {"when": {"sae": "std", "feature": 1, "above": 0.0}}
ABORT = {"then": "abort", "when": {"sae": "jump", "feature": 1, "above": 0.0}}


def test_the_digest_tells_latches_effects_and_hook_points_apart_and_not_who_asked(catalog: Catalog) -> None:
    (plain,) = _plan(catalog, A | {"when": {"feature": 1, "above": 0.0}}).rows
    (gate,) = plain.gates
    effects: list[Effect] = ["edit", "force", "hold", "observe", "abort"]
    rows = [replace(plain, effect=effect, latch=latch) for effect in effects for latch in (False, True)]
    rows.append(replace(plain, gates=(replace(gate, point=2),)))
    digests = {build_plan([row], catalog).digest for row in rows}
    assert len(digests) == len(rows)
    theirs = replace(plain, origin=Origin(7, "policy", "watch"))
    assert build_plan([theirs], catalog).digest == build_plan([plain], catalog).digest
    assert build_plan([plain], catalog, drop=True).digest != build_plan([plain], catalog).digest


def test_all_that_a_row_is_travels(catalog: Catalog) -> None:
    plan = _plan(catalog, A | EARLIER | {"latch": True}, ABORT)
    effects: list[Effect] = ["force", "observe", "hold"]
    rows = [replace(plan.rows[0], feature=at, effect=effect) for at, effect in enumerate(effects)]
    merged = build_plan([*plan.rows, *rows], catalog)
    again = Plan.from_wire(msgspec.msgpack.decode(msgspec.msgpack.encode(merged.wire)))
    assert again == merged
    assert again.bits == merged.bits


def test_a_condition_may_look_at_an_earlier_hook_point(catalog: Catalog) -> None:
    (row,) = _plan(catalog, A | {"when": [EARLIER["when"], {"feature": 6, "above": 1.0}]}).rows
    assert [(gate.point, gate.source) for gate in row.gates] == [(2, "sae:std"), (3, "sae:jump")]
    assert [gate.point for gate in row.earlier] == [2]


def test_pipeline_stages_share_no_earlier_hook_point(catalog: Catalog) -> None:
    staged = replace(catalog, stages=2)
    assert _plan(staged, A | {"when": {"feature": 1, "above": 0.0}}).rows
    with pytest.raises(RequestError, match="pipeline stages share no others"):
        _plan(staged, A | EARLIER)


def test_an_abort_stands_where_the_last_of_its_conditions_is_known(catalog: Catalog) -> None:
    when = [{"sae": "jump", "feature": 1, "above": 0.0}, {"sae": "std", "feature": 9, "below": 1.0}]
    (row,) = _plan(catalog, {"then": "abort", "when": when}).rows
    assert (row.point, row.source, row.feature, row.effect) == (3, "sae:jump", 1, "abort")
    assert not row.applies


def test_an_abort_may_read_what_another_intervention_changes(catalog: Catalog) -> None:
    plan = _plan(catalog, A | {"feature": 1}, ABORT)
    assert {row.effect for row in plan.rows} == {"edit", "abort"}


@pytest.mark.parametrize(
    ("changed", "needs"),
    [
        ({}, True),
        ({"where": {"phase": "prompt"}}, True),
        ({"where": {"start": -1}}, True),
        ({"where": {"phase": "generation"}}, False),
    ],
)
def test_only_what_happens_in_generation_lasts_without_the_prompts_history(
    catalog: Catalog, changed: dict[str, Any], needs: bool
) -> None:
    latch = A | {"when": {"feature": 1, "above": 0.0}, "latch": True}
    assert _plan(catalog, latch | changed).needs_history is needs
    assert _plan(catalog, ABORT | changed).needs_history is needs
    assert not _plan(catalog, A | EARLIER | changed).needs_history


def test_a_plan_says_whether_it_notes_and_whether_it_may_end(catalog: Catalog) -> None:
    latch = A | {"when": {"feature": 1, "above": 0.0}, "latch": True}
    said = [(plan.notes, plan.may_abort) for plan in (_plan(catalog, one) for one in (A, latch, ABORT))]
    assert said == [(False, False), (True, False), (True, True)]
    (row,) = _plan(catalog, A).rows
    held = build_plan([replace(row, effect="hold")], catalog)
    assert (held.notes, held.may_abort, held.ending) == (True, True, [0])


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (A | {"latch": True}, "expected `when` beside `latch`, which waits for a condition"),
        ({"then": "abort"}, 'expected `when` beside `then` "abort", which waits for a condition'),
        (ABORT | {"op": "ablate"}, 'expected no `op` beside `then` "abort", which changes nothing'),
        (ABORT | {"value": 1.0}, 'expected no `value` beside `then` "abort", which changes nothing'),
        (ABORT | {"sae": "jump"}, 'expected no `sae` beside `then` "abort", which changes nothing'),
        (ABORT | {"feature": 1}, 'expected no `feature` beside `then` "abort", which changes nothing'),
        (ABORT | {"direction": "north"}, 'expected no `direction` beside `then` "abort"'),
        (ABORT | {"latch": True}, "expected neither `latch`, `only_if_active` nor `unit` beside `then`"),
        (ABORT | {"only_if_active": True}, "expected neither `latch`, `only_if_active` nor `unit`"),
        (ABORT | {"unit": "max"}, "expected neither `latch`, `only_if_active` nor `unit`"),
        (A | {"then": "stop"}, "expected `then` to be one of 'apply' or 'abort', got \"stop\""),
        (A | {"latch": 1}, "expected `latch` to be a boolean, got 1"),
        ({"sae": "jump", "feature": 1}, "expected `op`, one of clamp, ablate, scale"),
        ({"sae": "jump", "op": "ablate"}, "expected exactly one of `feature` and `direction`"),
    ],
)
def test_what_latches_or_ends_a_request_must_be_whole(
    catalog: Catalog, intervention: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        _plan(catalog, intervention)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(f"- at {caught.value.param}")
    assert caught.value.param.startswith("$.steering.interventions[0]")


def test_only_if_active_is_a_condition_that_may_latch(catalog: Catalog) -> None:
    (row,) = _plan(catalog, A | {"only_if_active": True, "latch": True}).rows
    assert row.is_stateful


def test_questions_of_later_hook_points_count_among_what_one_reads(catalog: Catalog) -> None:
    asking = [
        {"sae": "jump", "feature": at, "op": "ablate", "when": {"sae": "std", "feature": at, "above": 0.0}}
        for at in range(16)
    ]
    assert _plan(catalog, *asking).rows
    # Each asks one question there, and reads one feature more.
    crowded = [
        one | {"when": [one["when"], {"sae": "std", "feature": 64 + at, "above": 0.0}]}
        for at, one in enumerate(asking)
    ]
    assert _plan(catalog, *crowded).rows
    crowded[0]["when"].append({"sae": "std", "feature": 100, "above": 0.0})
    with pytest.raises(RequestError, match="at most 32 features read at one hook point, got 33") as caught:
        _plan(catalog, *crowded)
    assert caught.value.reason == "too_many"
