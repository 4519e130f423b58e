import json
from dataclasses import replace
from math import inf
from typing import Any, cast

import pytest

from steerserve.catalog import Catalog, Source
from steerserve.compile import compile_plan
from steerserve.hookpoint import HookPoint
from steerserve.plan import Plan, build_plan
from steerserve.report import Counts, Reporter, TicketTally, merge_workers
from steerserve.row import Origin
from steerserve.sae import Sae
from steerserve.spec import SteeringSpec, parse_spec

NO_WEIGHTS = cast(Sae, None)
NOTHING = [0, -1, 0, 0.0, -inf, 0.0, -inf, 0, 0]


def worker(*requests: list[list[Any]], tokens: int = 0, in_use: int = 1, **place: int) -> dict[str, Any]:
    return {
        "tallies": {"t": list(requests)},
        "requests": {"t": len(requests)},
        "inexact": [],
        "tokens": [["sae:a", "add", tokens]],
        "slots": {"in_use": in_use, "capacity": 4},
        **place,
    }


def test_tensor_parallel_ranks_are_not_counted_twice() -> None:
    row = [1, -1, 3, 6.0, 4.0, 9.0, 5.0, 2, 1]
    merged = merge_workers([worker([row], tokens=3, tp_rank=0), worker([row], tokens=3, tp_rank=1)])
    assert merged.tallies["t"] == TicketTally(1, {0: Counts(3, 1, 6.0, 4.0, 9.0, 5.0, 2, 1)})
    assert (merged.tokens, merged.slots_in_use, merged.slots_capacity) == ({("sae:a", "add"): 3}, 1, 4)


def test_every_pipeline_stage_is_believed_about_its_own_layers() -> None:
    first = worker([[0, 4, 3, 6.0, 4.0, 9.0, 5.0, 3, 0], NOTHING, NOTHING], pp_rank=0)
    second = worker([NOTHING, [0, -1, 2, 1.0, 1.0, 2.0, 1.0, 2, 0], [0, 9, *NOTHING[2:]]], pp_rank=1)
    rows = merge_workers([first, second]).tallies["t"].rows
    assert [rows[number].tokens for number in range(3)] == [3, 2, 0]
    assert [rows[number].since for number in range(3)] == [4, -1, 9]


def test_replicas_serve_different_requests_and_are_summed() -> None:
    one = worker([[1, -1, 3, 6.0, 4.0, 9.0, 5.0, 3, 1]], tokens=3, dp_rank=0)
    two = worker([[0, 8, 1, 1.0, 7.0, 1.0, 2.0, 1, 1]], tokens=9, dp_rank=1)
    merged = merge_workers([one, two, {}])
    assert merged.tallies["t"] == TicketTally(2, {0: Counts(4, 1, 7.0, 7.0, 10.0, 5.0, 4, 2, 8)})
    assert (merged.tokens["sae:a", "add"], merged.slots_in_use, merged.slots_capacity) == (12, 2, 8)


def test_several_engine_requests_of_one_ticket_are_summed() -> None:
    rows = [[1, 7, 3, 6.0, 4.0, 9.0, 5.0, 3, 0]], [[0, 5, 2, 1.0, 9.0, 1.0, 1.0, 1, 1]]
    merged = merge_workers([worker(*rows)])
    assert merged.tallies["t"] == TicketTally(2, {0: Counts(5, 1, 7.0, 9.0, 10.0, 5.0, 4, 1, 5)})


def test_two_rows_on_one_feature_are_counted_apart() -> None:
    merged = merge_workers(
        [worker([[0, -1, 3, 6.0, 4.0, 9.0, 5.0, 3, 0], [0, -1, 9, 1.0, 1.0, 1.0, 1.0, 1, 1]])]
    )
    assert [merged.tallies["t"].rows[number].tokens for number in (0, 1)] == [3, 9]


def test_no_workers_collect_nothing() -> None:
    assert merge_workers([]) == merge_workers([{}, {}])


@pytest.fixture
def catalog() -> Catalog:
    sae = Source("sae:a", "a", HookPoint(1), 16, "f", NO_WEIGHTS, {"legal": (7,), "law": (7,)})
    french = Source("direction:french", "french", HookPoint(1), 1, "g", NO_WEIGHTS)
    return Catalog({sae.key: sae, french.key: french}, 4, 8, frozenset(), 16)


def compiled(catalog: Catalog, *interventions: dict[str, Any]) -> tuple[SteeringSpec, Plan]:
    spec = parse_spec({"interventions": list(interventions)})
    return spec, compile_plan(spec, catalog)


def _number(plan: Plan, feature: int) -> int:
    return [row.feature for row in plan.rows].index(feature)


def test_a_report_is_in_the_order_of_the_request(catalog: Catalog) -> None:
    ablate = {"feature": "law", "op": "ablate"}
    spec, plan = compiled(
        catalog, ablate, {"feature": 3, "op": "ablate"}, {"direction": "french", "op": "add", "value": 1}
    )
    tally = TicketTally(2, {_number(plan, 7): Counts(4, 1, 6.0, 4.0, 0.0, 0.0)})
    report = Reporter(catalog).report(spec, plan, tally)
    law, three, french = report["interventions"]
    assert law == {
        "sae": "a",
        "feature": 7,
        "label": "law",
        "op": "ablate",
        "tokens": 4,
        "tokens_from_cache": 1,
        "before": {"mean": 1.5, "max": 4.0},
        "after": {"mean": 0.0, "max": 0.0},
    }
    assert (three["feature"], three["tokens"], three["before"], "label" in three) == (3, 0, None, False)
    assert (french["direction"], "feature" in french) == ("french", False)
    assert (report["digest"], report["requests"], report["policies"]) == (plan.digest, 2, [])


def test_an_index_is_shown_with_its_first_label(catalog: Catalog) -> None:
    spec, plan = compiled(catalog, {"feature": 7, "op": "ablate"})
    assert Reporter(catalog).report(spec, plan, None)["interventions"][0]["label"] == "legal"


@pytest.mark.parametrize(("requests", "admitted", "incomplete"), [(0, 1, True), (1, 2, True), (4, 2, False)])
def test_a_report_that_lacks_requests_says_so(
    catalog: Catalog, requests: int, admitted: int, incomplete: bool
) -> None:
    spec, plan = compiled(catalog, {"feature": 7, "op": "ablate"})
    report = Reporter(catalog).report(spec, plan, TicketTally(requests), admitted=admitted)
    assert report.get("incomplete", False) is incomplete


def test_a_report_is_json_whatever_the_numbers(catalog: Catalog) -> None:
    spec, plan = compiled(catalog, {"feature": 7, "op": "ablate"})
    tally = TicketTally(1, {0: Counts(1, 0, inf, inf, float("nan"), -inf)})
    report = Reporter(catalog).report(spec, plan, tally)
    assert report["interventions"][0]["before"] is None
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.parametrize(("since", "shown"), [(5, 5), (0, 0), (-1, None)])
def test_a_report_says_where_a_row_latched_and_where_one_ended_the_request(
    catalog: Catalog, since: int, shown: int | None
) -> None:
    when = {"when": {"feature": 9, "above": 1.0}}
    spec, plan = compiled(
        catalog, {"then": "abort", **when}, {"feature": 3, "op": "ablate", "latch": True, **when}
    )
    tally = TicketTally(1, {number: Counts(since=since) for number in range(2)})
    ended, latched = Reporter(catalog).report(spec, plan, tally)["interventions"]
    assert ended == {"then": "abort", "aborted_at": shown}
    assert latched["latched_at"] == shown


def test_a_row_that_does_not_latch_says_nothing_of_it(catalog: Catalog) -> None:
    spec, plan = compiled(catalog, {"feature": 3, "op": "ablate"})
    assert "latched_at" not in Reporter(catalog).report(spec, plan, None)["interventions"][0]


WHERE = {"where": {"phase": "prompt", "start": 40}}


@pytest.mark.parametrize(
    ("changed", "counts", "unmatched", "got"),
    [
        (WHERE, Counts(), {}, "some token of this request, got none"),
        (WHERE, Counts(), {1: 3}, "some token of this request, got none"),
        (WHERE, Counts(2), {1: 1}, "some token of each of 3 prompts, got none of 1 of them"),
        (WHERE, Counts(from_cache=2), {}, None),
        (WHERE, Counts(2), {}, None),
        # Conditions that never held are no fault of the window.
        (WHERE | {"only_if_active": True}, Counts(), {}, None),
        (WHERE | {"when": {"feature": 9, "above": 1.0}}, Counts(), {}, None),
        (WHERE | {"when": {"feature": 9, "above": 1.0}}, Counts(), {1: 3}, "this request, got none"),
    ],
)
def test_a_report_warns_of_a_window_that_matched_nothing(
    catalog: Catalog, changed: dict[str, Any], counts: Counts, unmatched: dict[int, int], got: str | None
) -> None:
    spec, plan = compiled(catalog, {"feature": 7, "op": "ablate"}, {"feature": 3, "op": "ablate", **changed})
    tally = TicketTally(3, {_number(plan, 7): Counts(4), _number(plan, 3): counts})
    report = Reporter(catalog).report(spec, plan, tally, admitted=3, unmatched=unmatched)
    if got is None:
        assert "warnings" not in report
        return
    (warning,) = report["warnings"]
    assert warning.startswith("expected a window that includes some token of")
    assert warning.endswith(f"{got} - at $.steering.interventions[1].where")


def test_counts_that_are_missing_are_no_window_that_matched_nothing(catalog: Catalog) -> None:
    spec, plan = compiled(catalog, {"feature": 7, "op": "ablate"})
    assert "warnings" not in Reporter(catalog).report(spec, plan, None)


def test_rows_of_one_feature_are_told_apart(catalog: Catalog) -> None:
    """One value in the prompt, another in the reply; the report is in the order of the request."""
    reply = {"feature": 7, "op": "clamp", "value": 1.0, "where": {"phase": "generation"}}
    prompt = {"feature": 7, "op": "ablate", "where": {"phase": "prompt", "stop": -1}}
    spec, plan = compiled(catalog, reply, prompt)
    tokens = {"clamp": 3, "ablate": 9}
    tally = TicketTally(1, {n: Counts(tokens[row.op]) for n, row in enumerate(plan.rows)})
    entries = Reporter(catalog).report(spec, plan, tally)["interventions"]
    assert [(entry["op"], entry["tokens"]) for entry in entries] == [("clamp", 3), ("ablate", 9)]


def test_rows_of_policies_are_no_interventions_of_the_request(catalog: Catalog) -> None:
    spec, plan = compiled(catalog, {"feature": 7, "op": "ablate"})
    policy = replace(plan.rows[0], feature=2, effect="hold", origin=Origin(0, "no-law"))
    merged = build_plan([policy, *plan.rows], catalog)
    counts = {_number(merged, 7): Counts(4), _number(merged, 2): Counts(6)}
    (entry,) = Reporter(catalog).report(spec, merged, TicketTally(1, counts))["interventions"]
    assert (entry["feature"], entry["tokens"]) == (7, 4)
