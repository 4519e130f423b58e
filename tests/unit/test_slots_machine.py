"""Requests come, run, are preempted, fail and go in any order; in every step each has its own plan's rows.

Two drivers of one `Worker`: hypothesis, which finds the shortest way to break it, and a seeded random one,
which makes 100,000 events.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from steerserve.catalog import Catalog, Source
from steerserve.compile import compile_plan
from steerserve.errors import CheckpointError
from steerserve.plan import Plan
from steerserve.runtime.host import HostRuntime
from steerserve.sae import FeatureRows
from steerserve.spec import parse_spec
from steerserve.steer.buffers import CEILING, A
from tests.support.models import D_MODEL, VOCAB
from tests.support.scale import amount, scaled

CAPACITY = 4
POINTS = (2, 3)
MAX_TOKENS = 64
EVENTS = 100_000
TOKEN = 9


@dataclass(frozen=True)
class Flaky(Source):
    """A source whose weights cannot be read while `broken` holds anything; what it once read it remembers."""

    broken: list[bool] = field(default_factory=list)
    known: dict[tuple[int, ...], FeatureRows] = field(default_factory=dict)

    def rows(self, features: Sequence[int]) -> FeatureRows:
        if self.broken:
            raise CheckpointError("expected to read it", path="nowhere")
        if tuple(features) not in self.known:
            self.known[tuple(features)] = super().rows(features)
        return self.known[tuple(features)]


@dataclass(frozen=True)
class Expected:
    """What a plan's slot must hold at one hook point: the catalog's rows, and the edit of each."""

    encoder: torch.Tensor
    decoder: torch.Tensor
    edits: torch.Tensor


@dataclass
class Life:
    """One request as the scheduler sees it. `counted`: positions below it were computed and stand."""

    plan: Plan
    cached: int
    position: int
    counted: int
    slot: int | None = None
    has_run: bool = False


@dataclass(frozen=True)
class Span:
    """What a request runs in a step: tokens, of which the last `drafts` are guesses, of which some hold."""

    tokens: int = 1
    drafts: int = 0
    accepted: int = 0


class Worker:
    """A runtime driven as a model runner drives it, and beside it what must be true, kept by hand."""

    def __init__(self, catalog: Catalog, plans: Sequence[Plan]) -> None:
        self.broken: list[bool] = []
        sources = {
            key: Flaky(**{f.name: getattr(s, f.name) for f in fields(s)}, broken=self.broken)
            for key, s in catalog.sources.items()
        }
        self.runtime = HostRuntime(
            replace(catalog, sources=sources),
            POINTS,
            max_requests=CAPACITY,
            max_tokens=MAX_TOKENS,
            vocab=VOCAB,
        )
        self.expected = {
            (plan.digest, point): _expected(plan, point, catalog) for plan in plans for point in POINTS
        }
        self.lives: dict[str, Life] = {}
        self.events: Counter[str] = Counter()
        self._last: dict[str, tuple[int, Span]] = {}
        self._names = 0

    def admit(self, plan: Plan, prompt: int, cached: int) -> None:
        self._names += 1
        name = f"request-{self._names}"
        self.runtime.add(name, plan.wire, np.full(prompt, TOKEN), name, cached)
        self.lives[name] = Life(plan, cached, cached, cached)
        self.events["admit"] += 1

    def end(self, name: str, how: str) -> None:
        self._settle({})
        self.runtime.remove(name)
        life = self.lives.pop(name)
        stood = life.counted - life.cached
        for row, (_, _, tokens, *_) in zip(
            life.plan.rows, self.runtime.collect({name: {}})["tallies"][name][0], strict=True
        ):
            assert 0 <= tokens <= stood if row.gates else tokens == stood, "each token counts once"
        self.events[how] += 1

    def step(self, spans: Mapping[str, Span], *, unreadable: bool = False) -> None:
        """One forward pass; names of no live request are requests that are not steered."""
        going_on = {name: life.position for name, life in self.lives.items() if name in spans}
        self.runtime.settle(going_on)
        self._settle(going_on)
        for name in self._last.keys() - spans.keys() & self.lives.keys():
            self.events["preempt"] += 1
            self.lives[name].position = 0
            self.lives[name].slot = None
        self._last = {}
        if unreadable:
            self.broken.append(True)
        try:
            self._begin(spans)
        except CheckpointError:
            assert unreadable
            self.events["fail"] += 1
            for life in self.lives.values():
                life.slot = None
            return
        finally:
            self.broken.clear()
        self._check_slots(spans)
        self._run(spans)

    def _begin(self, spans: Mapping[str, Span]) -> None:
        starts = [self.lives[name].position if name in self.lives else 0 for name in spans]
        tokens = np.array([span.tokens for span in spans.values()], dtype=np.int32)
        drafts = np.array([span.drafts for span in spans.values()], dtype=np.int32)
        ids = np.full(int(tokens.sum()), TOKEN, dtype=np.int32)
        self.runtime.begin_step(list(spans), tokens, np.array(starts, dtype=np.int32), ids, drafts)

    def _run(self, spans: Mapping[str, Span]) -> None:
        stream = torch.zeros(sum(span.tokens for span in spans.values()), D_MODEL)
        for point in POINTS:
            self.runtime.steer(point, stream, None)
        self.runtime.end_step()
        for name, span in spans.items():
            if (life := self.lives.get(name)) is not None:
                self._last[name] = life.position + span.tokens, span
                life.position += span.tokens - span.drafts + span.accepted
                self.events["resume"] += life.has_run and life.slot is None
                life.has_run = True

    def _settle(self, going_on: Mapping[str, int]) -> None:
        """Tokens that stand: of a request that goes on those before it, of others all but the drafts."""
        for name, (end, span) in self._last.items():
            if name in self.lives:
                limit = going_on.get(name, end - span.drafts)
                self.lives[name].counted = max(self.lives[name].counted, limit)

    def _check_slots(self, spans: Mapping[str, Span]) -> None:
        tokens, names = self.runtime.tokens, list(spans)
        read: dict[str, set[int]] = {}
        for owner, slot in zip(tokens.owner[: tokens.count], tokens.slot_view[: tokens.count], strict=True):
            read.setdefault(names[owner], set()).add(int(slot))
        running = self.lives.keys() & spans.keys()
        assert read.keys() == running, "every steered request of the batch is steered, and nothing else"
        slots = {name: slot for name in running for slot in read[name]}
        assert all(len(read[name]) == 1 for name in running)
        digests = {name: self.lives[name].plan.digest for name in running}
        assert len(set(zip(slots.values(), (digests[name] for name in slots), strict=True))) == len(
            set(slots.values())
        ), "a slot holds one plan"
        assert self.runtime.slots.in_use == len(set(digests.values())) <= CAPACITY
        for name in running:
            life, slot = self.lives[name], slots[name]
            assert 0 <= slot < CAPACITY
            assert life.slot in (None, slot), "a slot that is held is never taken away"
            self._check_contents(slot, life.plan)
            self.events["resume"] += life.has_run and life.slot is None
            life.slot = slot

    def _check_contents(self, slot: int, plan: Plan) -> None:
        for point, buffers in self.runtime.buffers.items():
            expected = self.expected[plan.digest, point]
            n = len(expected.encoder)
            assert int(buffers.count[slot]) == n
            assert torch.equal(buffers.encoder[slot, :n], expected.encoder)
            assert torch.equal(buffers.decoder[slot, :n], expected.decoder)
            assert torch.equal(buffers.params[slot, : len(expected.edits), A:CEILING], expected.edits)


def _expected(plan: Plan, point: int, catalog: Catalog) -> Expected:
    rows = [row for row in plan.rows if row.point == point]
    gates = [(gate.source, gate.feature) for row in rows for gate in row.gates]
    read = list(dict.fromkeys([*((row.source, row.feature) for row in rows), *gates]))
    weights = [catalog.sources[source].rows([feature]) for source, feature in read]
    none = torch.empty(0, D_MODEL)
    return Expected(
        torch.cat([none, *(part.encoder for part in weights)]),
        torch.cat([none, *(part.decoder for part in weights)]),
        torch.tensor([[row.a, row.c, row.lo, row.hi] for row in rows]).view(-1, 4),
    )


def _plans(catalog: Catalog) -> list[Plan]:
    """Plans that differ in feature, in value alone, in place, in number of rows, and in a condition."""

    def plan(*interventions: dict[str, Any]) -> Plan:
        return compile_plan(parse_spec({"interventions": list(interventions)}), catalog)

    one = {"sae": "jump", "feature": 3, "op": "clamp", "value": 2.0}
    gate = {"sae": "gate", "feature": 5, "above": 0.5}
    found = [plan(one | {"value": float(i)}) for i in range(4)]
    found += [plan(one | {"feature": i}) for i in range(4, 8)]
    found += [plan({"sae": "std", "feature": i, "op": "add", "value": 1.0}) for i in range(4)]
    found += [plan(one, {"sae": "std", "feature": i, "op": "ablate"}) for i in range(4)]
    found += [plan(one | {"when": gate}), plan({"direction": "north", "op": "add", "value": 3.0}, one)]
    return found


@pytest.fixture(scope="module")
def plans(catalog: Catalog) -> list[Plan]:
    found = _plans(catalog)
    assert len({plan.digest for plan in found}) == len(found) > 4 * CAPACITY
    return found


@pytest.fixture(scope="module", autouse=True)
def _machine(catalog: Catalog, plans: list[Plan]) -> None:
    Requests.catalog, Requests.plans = catalog, plans


SPAN = st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3)).map(
    lambda drawn: Span(drawn[0], min(drawn[1], drawn[0] - 1), min(drawn[2], drawn[1], drawn[0] - 1))
)


class Requests(RuleBasedStateMachine):
    catalog: Catalog
    plans: list[Plan]

    def __init__(self) -> None:
        super().__init__()
        self.worker = Worker(self.catalog, self.plans)

    @rule(data=st.data(), prompt=st.integers(1, 6), cached=st.integers(0, 5))
    def admit(self, data: st.DataObject, prompt: int, cached: int) -> None:
        plan = data.draw(st.sampled_from(range(len(self.plans))))
        self.worker.admit(self.plans[plan], prompt, min(cached, prompt - 1))

    @precondition(lambda self: self.worker.lives)
    @rule(data=st.data(), how=st.sampled_from(["finish", "abort"]))
    def end(self, data: st.DataObject, how: str) -> None:
        self.worker.end(data.draw(st.sampled_from(sorted(self.worker.lives))), how)

    @rule(data=st.data(), unreadable=st.booleans())
    def step(self, data: st.DataObject, unreadable: bool) -> None:
        names = ["plain", *sorted(self.worker.lives)]
        batch = data.draw(st.lists(st.sampled_from(names), max_size=CAPACITY, unique=True))
        self.worker.step({name: data.draw(SPAN) for name in batch}, unreadable=unreadable)

    def teardown(self) -> None:
        _end_all(self.worker)


Requests.TestCase.settings = settings(max_examples=amount(100, 40), stateful_step_count=30, deadline=None)
TestRequests = scaled(Requests.TestCase)


def _end_all(worker: Worker) -> None:
    for name in list(worker.lives):
        worker.end(name, "finish")
    assert worker.runtime.collect({})["slots"] == {"in_use": 0, "capacity": CAPACITY}
    assert not worker.runtime.is_active or not worker.lives


@pytest.mark.slow
def test_100_000_events_leave_nothing_behind(catalog: Catalog, plans: list[Plan]) -> None:
    rng = random.Random(0)
    worker = Worker(catalog, plans)
    kinds = ("admit", "abort", "preempt", "finish")
    while sum(worker.events[kind] for kind in kinds) < EVENTS:
        while len(worker.lives) < rng.randint(2, 3 * CAPACITY):
            prompt = rng.randint(1, 6)
            worker.admit(rng.choice(plans), prompt, rng.randrange(prompt))
        for name in list(worker.lives):
            if rng.random() < 0.25:
                worker.end(name, rng.choice(["finish", "abort"]))
        batch = _batch(rng, worker)
        worker.step(batch)
        if rng.random() < 0.1:
            # A step that cannot read its weights, between two steps of the same batch.
            worker.step(_batch(rng, worker), unreadable=True)
            worker.step(batch)
    assert all(worker.events[kind] > EVENTS / 20 for kind in kinds), worker.events
    assert worker.events["resume"] > 1000
    assert worker.events["fail"] > 10
    _end_all(worker)


def _batch(rng: random.Random, worker: Worker) -> dict[str, Span]:
    names = ["plain", *worker.lives]
    batch = {}
    for name in rng.sample(names, rng.randint(0, min(CAPACITY, len(names)))):
        tokens = rng.randint(1, 4)
        drafts = rng.randrange(tokens)
        batch[name] = Span(tokens, drafts, rng.randint(0, drafts))
    return batch
