"""The runtime driven by hand, as a model runner would, against a count made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from steerserve.catalog import Catalog
from steerserve.compile import compile_plan
from steerserve.plan import Plan
from steerserve.recent import WINDOW
from steerserve.runtime.host import HostRuntime
from steerserve.spec import parse_spec
from tests.support.models import D_MODEL, VOCAB

ONE = {"sae": "jump", "feature": 3, "op": "clamp", "value": 2.0}


def _plan(catalog: Catalog, **changed: Any) -> Plan:
    return compile_plan(parse_spec({"interventions": [ONE | changed]}), catalog)


def _runtime(catalog: Catalog, requests: int = 4) -> HostRuntime:
    return HostRuntime(catalog, [2, 3], max_requests=requests, max_tokens=64, vocab=VOCAB)


def _step(
    runtime: HostRuntime, spans: dict[str, tuple[int, int]], drafts: dict[str, int] | None = None
) -> torch.Tensor:
    """One forward pass over `spans`: request → (tokens before, tokens now)."""
    computed = np.array([c for c, _ in spans.values()], dtype=np.int32)
    scheduled = np.array([n for _, n in spans.values()], dtype=np.int32)
    speculative = np.array([(drafts or {}).get(r, 0) for r in spans], dtype=np.int32)
    ids = np.full(int(scheduled.sum()), 9, dtype=np.int32)
    runtime.begin_step(list(spans), scheduled, computed, ids, speculative)
    stream = torch.zeros(len(ids), D_MODEL)
    runtime.steer(3, stream, None)
    runtime.steer(2, stream, None)
    runtime.end_step()
    return stream


def _tokens(runtime: HostRuntime, ticket: str) -> int:
    return int(runtime.collect({ticket: {}})["tallies"][ticket][0][0][2])


def _add(runtime: HostRuntime, name: str, plan: Plan, prompt_len: int = 8, computed: int = 0) -> None:
    runtime.add(name, plan.wire, np.full(prompt_len, 9), name, computed)


def test_only_the_tokens_of_steered_requests_change(catalog: Catalog) -> None:
    runtime = _runtime(catalog)
    _add(runtime, "a", _plan(catalog))
    stream = _step(runtime, {"plain": (0, 5), "a": (0, 8), "other": (3, 1)})
    assert stream.any(dim=1).tolist() == [False] * 5 + [True] * 8 + [False]


def test_nothing_is_steered_outside_a_step(catalog: Catalog) -> None:
    runtime = _runtime(catalog)
    _add(runtime, "a", _plan(catalog))
    _step(runtime, {"a": (0, 8)})
    warm_up = torch.zeros(8, D_MODEL)
    runtime.steer(3, warm_up, None)
    assert not warm_up.any()


def test_recomputed_tokens_are_counted_once(catalog: Catalog) -> None:
    runtime = _runtime(catalog)
    _add(runtime, "a", _plan(catalog))
    _step(runtime, {"a": (0, 5)})
    _step(runtime, {"a": (5, 3)})
    runtime.settle({"a": 0})  # preempted: everything is computed again
    _step(runtime, {"a": (0, 8)})
    _step(runtime, {"a": (8, 1)})
    runtime.remove("a")
    assert _tokens(runtime, "a") == 9


def test_rejected_drafts_are_not_counted_and_accepted_ones_are(catalog: Catalog) -> None:
    runtime = _runtime(catalog)
    _add(runtime, "a", _plan(catalog))
    _step(runtime, {"a": (0, 8)})
    _step(runtime, {"a": (8, 4)}, drafts={"a": 3})
    runtime.settle({"a": 10})  # one of three accepted
    _step(runtime, {"a": (10, 1)})
    runtime.remove("a")
    assert _tokens(runtime, "a") == 11


def test_a_report_taken_between_steps_does_not_lose_accepted_drafts(catalog: Catalog) -> None:
    runtime = _runtime(catalog)
    _add(runtime, "a", _plan(catalog))
    _step(runtime, {"a": (0, 8)}, drafts={"a": 2})
    runtime.collect({"somebody else": {}})
    runtime.settle({"a": 8})
    runtime.remove("a")
    assert _tokens(runtime, "a") == 8


def test_a_prompt_read_from_the_cache_is_reported_apart(catalog: Catalog) -> None:
    runtime = _runtime(catalog)
    _add(runtime, "a", _plan(catalog, where={"start": 2}), computed=6)
    _step(runtime, {"a": (6, 2)})
    ((cached, since, tokens, *_),) = runtime.collect({"a": {}})["tallies"]["a"][0]
    assert (cached, since, tokens) == (4, -1, 2)


def test_what_came_from_the_cache_is_counted_by_each_rows_own_window(catalog: Catalog) -> None:
    runtime = _runtime(catalog)
    early = {"sae": "std", "feature": 1, "above": 0.0}
    rows = [
        ONE,
        ONE | {"feature": 4},
        ONE | {"feature": 5, "where": {"start": 4}},
        ONE | {"feature": 6, "when": early},
    ]
    plan = compile_plan(parse_spec({"interventions": rows}), catalog)
    _add(runtime, "a", plan, computed=6)
    told = runtime.collect({"a": {}})["tallies"]["a"][0]
    cached = {row.feature: told[number][0] for number, row in enumerate(plan.rows)}
    assert cached == {3: 6, 4: 6, 5: 2, 6: 6}


def test_a_latch_that_lies_ahead_outlasts_a_second_preemption(catalog: Catalog) -> None:
    runtime = _runtime(catalog)
    # Holds nowhere in a stream of zeros, and was noted by hand.
    _add(runtime, "a", _plan(catalog, when={"feature": 9, "above": 1e5}, latch=True), prompt_len=12)
    _step(runtime, {"a": (0, 12)})
    runtime._since[0, 0] = 7
    _step(runtime, {"a": (0, 3)})  # preempted, computed again, and preempted before position 7
    assert _step(runtime, {"a": (9, 3)}).any(dim=1).tolist() == [True] * 3  # the rest came from the cache
    assert not _step(runtime, {"a": (5, 7)}).any()  # position 7 is computed again, and holds no more


def test_more_plans_than_slots_can_live_as_long_as_they_do_not_run_together(catalog: Catalog) -> None:
    runtime = _runtime(catalog, requests=2)
    for i in range(6):
        _add(runtime, f"r{i}", _plan(catalog, value=float(i)))
    for i in range(0, 6, 2):
        stream = _step(runtime, {f"r{i}": (0, 1), f"r{i + 1}": (0, 1)})
        assert not torch.equal(stream[0], stream[1])
    for i in range(6):
        runtime.remove(f"r{i}")
    assert runtime.collect({})["slots"] == {"in_use": 0, "capacity": 2}


def _wire(runtime: HostRuntime, ticket: str, end: int | None = None) -> tuple[int, float, float, bool]:
    """Of the one row of the one request: tokens, sum and maximum before, and whether they are exact."""
    found = runtime.collect({ticket: {} if end is None else {ticket: end}})
    ((_, _, tokens, total, largest, *_),) = found["tallies"][ticket][0]
    return tokens, total, largest, ticket not in found["inexact"]


def _generate(runtime: HostRuntime, name: str, prompt: int, tokens: int) -> None:
    """A prompt, and a step for every token behind it. At position p the feature is p + 1."""
    spans = [(0, prompt), *((at, 1) for at in range(prompt, prompt + tokens))]
    for at, n in spans:
        begins, counts = np.array([at], dtype=np.int32), np.array([n], dtype=np.int32)
        runtime.begin_step([name], counts, begins, np.full(n, 9, dtype=np.int32))
        runtime.steer(3, torch.zeros(n, D_MODEL), None)
        runtime._trace[3][:n, 0, 0] = torch.arange(at + 1, at + n + 1)
        runtime.end_step()


@pytest.mark.parametrize("is_over", [False, True])
@pytest.mark.parametrize("beyond", [0, 1, 5, WINDOW, WINDOW + 1])
def test_what_was_computed_behind_a_requests_end_is_left_out_or_owned_up_to(
    catalog: Catalog, is_over: bool, beyond: int
) -> None:
    runtime = _runtime(catalog)
    _add(runtime, "a", _plan(catalog))
    _generate(runtime, "a", prompt=8, tokens=12 + beyond)
    if is_over:
        runtime.remove("a")
    tokens, total, largest, exact = _wire(runtime, "a", end=20)
    assert exact == (beyond <= WINDOW)
    if exact:
        assert (tokens, total, largest) == (20, 20 * 21 / 2, 20)
    runtime.remove("a")
    assert runtime.collect({})["tokens"] == [["sae:jump", "clamp", tokens]]


def test_of_a_request_whose_end_nobody_knows_everything_counts(catalog: Catalog) -> None:
    runtime = _runtime(catalog)
    _add(runtime, "a", _plan(catalog))
    _generate(runtime, "a", prompt=8, tokens=200)
    assert _wire(runtime, "a") == (208, 208 * 209 / 2, 208, True)


def test_totals_are_of_requests_that_have_ended_and_whose_end_is_known(catalog: Catalog) -> None:
    runtime = _runtime(catalog)
    _add(runtime, "a", _plan(catalog))
    runtime.add("b", _plan(catalog).wire, np.full(8, 9), "", 0)
    _step(runtime, {"a": (0, 8), "b": (0, 5)})
    runtime.remove("a")
    assert runtime.collect({})["tokens"] == []
    assert runtime.collect({"a": {"a": 7}})["tokens"] == [["sae:jump", "clamp", 7]]
    runtime.remove("b")
    assert runtime.collect({})["tokens"] == [["sae:jump", "clamp", 12]]


def test_nothing_counts_behind_the_position_that_ends_a_request_wherever_its_step_ends(
    catalog: Catalog,
) -> None:
    runtime = _runtime(catalog)
    abort = {"then": "abort", "when": {"sae": "jump", "feature": 9, "above": 1e5}}
    plan = compile_plan(parse_spec({"interventions": [abort, ONE]}), catalog)
    _add(runtime, "a", plan, prompt_len=30)
    _step(runtime, {"a": (0, 30)})
    runtime._since[0, plan.ending[0]] = 11
    rows = runtime.collect({"a": {}})["tallies"]["a"][0]
    assert max(tokens for _, _, tokens, *_ in rows) == 12


def test_after_a_request_that_may_end_its_neighbours_step_on(catalog: Catalog) -> None:
    runtime = _runtime(catalog)
    abort = {"then": "abort", "when": {"sae": "jump", "feature": 3, "above": 1e5}}
    plan = compile_plan(parse_spec({"interventions": [abort]}), catalog)
    runtime.add("a", plan.wire, np.arange(3, 7), "", 0)
    ids = np.arange(3, 7, dtype=np.int32)
    runtime.begin_step(["a", "b"], np.array([2, 2], np.int32), np.zeros(2, np.int32), ids)
    assert runtime.may_abort
    assert runtime.aborts() == {}
    runtime.remove("a")
    assert not runtime.may_abort
    assert runtime.aborts() == {}
