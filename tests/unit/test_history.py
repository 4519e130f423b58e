"""What latches, and what ends a request, is the same however a scheduler cuts it.

A scheduler of whims drives a runtime: it cuts prompts anywhere, preempts and resumes, reads prefixes from the
cache where a plan allows it, has drafts rejected and mixes requests. What the runtime decided of every token
is compared with plain Python that reads each request once, from its first token to its last.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import steerserve.runtime.device
from steerserve.catalog import Catalog
from steerserve.compile import compile_plan
from steerserve.plan import Plan, build_plan
from steerserve.reach import can_match
from steerserve.row import Effect, Row
from steerserve.runtime import Runtime
from steerserve.runtime.device import DeviceRuntime
from steerserve.runtime.host import HostRuntime
from steerserve.spec import Where, parse_spec
from steerserve.window import END, Window
from tests.support.models import D_MODEL, VOCAB
from tests.support.reference import touches
from tests.unit.steer.interpreting import interpreted

pytestmark = pytest.mark.interpreted

POINTS = (2, 3)
MAX_REQUESTS, MAX_TOKENS = 3, 48
SPECIAL = frozenset({0, 1, 2})
NEVER = -1
Decision = tuple[int, int]


@dataclass
class Asked:
    """A request: its plan as it was written and as it was compiled, its tokens and their streams.

    ids [n]; base: at each hook point [n, d]; decided: (position, row) of everything that a row did.
    """

    name: str
    interventions: list[dict[str, Any]]
    plan: Plan
    prompt_len: int
    ids: list[int]
    base: dict[int, Tensor]
    cached: int = 0
    computed: int = 0
    stands: int = 0
    counted: int = 0
    uncertain: int = 0
    decided: set[Decision] = field(default_factory=set)
    ended_at: int = NEVER


@dataclass(frozen=True)
class Verdict:
    """What plain Python says of a request: all that its rows do, and where each latches or ends it."""

    decided: set[Decision]
    since: list[int]
    ends: int


def verdict(request: Asked, catalog: Catalog) -> Verdict:
    """Read a request once, position after position."""
    rows, decided = request.plan.rows, set()
    since = [NEVER] * len(rows)
    f = _activations(request, catalog)
    for position in range(len(request.ids)):
        for number, row in enumerate(rows):
            if not _selects(request, row, position):
                continue
            holds = all(
                gate.above < float(f[gate.source][position, gate.feature]) < gate.below for gate in row.gates
            )
            if holds and (row.latch or row.effect == "abort") and since[number] == NEVER:
                since[number] = position
            if since[number] != NEVER if row.latch else holds:
                decided.add((position, number))
    ends = [at for at, row in zip(since, rows, strict=True) if row.effect == "abort" and at != NEVER]
    return Verdict(decided, since, min(ends, default=NEVER))


def _selects(request: Asked, row: Row, position: int) -> bool:
    one = request.interventions[row.origin.index]
    return touches(one, position, request.ids, request.prompt_len, SPECIAL)


def _activations(request: Asked, catalog: Catalog) -> dict[str, Tensor]:
    keys = {row.source for row in request.plan.rows}
    keys |= {gate.source for row in request.plan.rows for gate in row.gates}
    found = {}
    for key in keys:
        source = catalog.sources[key]
        rows = source.rows(range(source.n_features))
        found[key] = rows.activations(request.base[source.point.index])
    return found


def random_request(rng: random.Random, catalog: Catalog, name: str) -> Asked:
    """Some tokens, and a plan of up to four rows over both hook points."""
    prompt_len, more = rng.randint(1, 14), rng.randint(1, 16)
    interventions = _interventions(rng)
    plan = compile_plan(parse_spec({"interventions": interventions}), catalog)
    plan = build_plan([_for_a_policy(rng, row) for row in plan.rows], catalog)
    ids = [rng.randint(0, 12) for _ in range(prompt_len + more)]
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    base = {point: torch.randn(len(ids), D_MODEL, generator=generator) for point in POINTS}
    cached = 0 if plan.needs_history else rng.choice([0, rng.randrange(prompt_len)])
    return Asked(name, interventions, plan, prompt_len, ids, base, cached, cached, cached, cached)


def _interventions(rng: random.Random) -> list[dict[str, Any]]:
    found = []
    for feature in rng.sample(range(20), rng.randint(1, 4)):
        late = rng.random() < 0.6
        when = [_condition(rng, late) for _ in range(rng.choice([0, 1, 1, 2]))]
        one: dict[str, Any] = {"where": _where(rng), "when": when}
        if when and rng.random() < 0.3:
            found.append(one | {"then": "abort"})
            continue
        place = {"sae": rng.choice(["jump", "gate"]) if late else "std", "feature": feature}
        op = rng.choice(["clamp", "add", "ablate", "at_most", "at_least"])
        one |= place | {"op": op, "only_if_active": rng.random() < 0.2}
        if op != "ablate":
            one["value"] = rng.choice([0.5, 2.0])
        one["latch"] = bool(when or one["only_if_active"]) and rng.random() < 0.6
        found.append(one)
    return found


def _condition(rng: random.Random, late: bool) -> dict[str, Any]:
    sae = rng.choice(["jump", "std"]) if late else "std"
    bound = rng.choice([{"above": 1.5}, {"above": 0.5}, {"below": 0.5}, {"above": 0.2, "below": 2.5}])
    return {"sae": sae, "feature": rng.randrange(20), **bound}


def _where(rng: random.Random) -> dict[str, Any]:
    """A window that some prompt has; others are refused."""
    while not can_match(Window.of(Where(**(where := _any_where(rng)))), SPECIAL, None):
        pass
    return where


def _any_where(rng: random.Random) -> dict[str, Any]:
    where: dict[str, Any] = {"phase": rng.choice(["all", "all", "prompt", "generation"])}
    if rng.random() < 0.3:
        where["start"] = rng.randint(-6, 8)
    if rng.random() < 0.2:
        where["stop"] = rng.randint(-3, 16)
    if rng.random() < 0.2:
        where["exclude_tokens"] = [rng.randint(3, 12)]
    if rng.random() < 0.2:
        where["exclude_positions"] = [rng.randint(-4, 9)]
    return where | ({"special_tokens": True} if rng.random() < 0.3 else {})


def _for_a_policy(rng: random.Random, row: Row) -> Row:
    if row.effect == "abort" or rng.random() < 0.6:
        return row
    effects: list[Effect] = ["force", "observe"]
    if row.op in ("ablate", "at_most") and not row.latch:
        effects.append("hold")
    return replace(row, effect=rng.choice(effects))


class Scheduler:
    """Cuts requests as it likes, and remembers what the runtime made of those of their tokens that stand."""

    def __init__(self, runtime: Runtime, catalog: Catalog, rng: random.Random) -> None:
        self.runtime, self.catalog, self.rng = runtime, catalog, rng
        self.waiting: list[Asked] = []
        self.live: list[Asked] = []
        self.events = {"preempt": 0, "reject": 0, "abort": 0, "cache": 0, "latch": 0}

    def run(self, requests: list[Asked]) -> None:
        """Until all have ended."""
        self.waiting = list(requests)
        while self.waiting or self.live:
            self._admit()
            self._preempt()
            # How many drafts stood is told with the next step, so nobody with drafts sits that one out.
            batch = [request for request in self.live if request.uncertain or self.rng.random() < 0.8]
            if batch:
                self._step(batch)

    def _admit(self) -> None:
        while self.waiting and len(self.live) < MAX_REQUESTS and self.rng.random() < 0.7:
            request = self.waiting.pop()
            self.events["cache"] += request.cached > 0
            self._hand_over(request)
            self.live.append(request)

    def _hand_over(self, request: Asked) -> None:
        prompt = np.array(request.ids[: request.prompt_len])
        self.runtime.add(request.name, request.plan.wire, prompt, request.name, request.computed)

    def _preempt(self) -> None:
        for request in self.live:
            if request.computed > request.cached and self.rng.random() < 0.15:
                # Drafts that stood, which no step has told the runtime, count only if they come again.
                found = self.rng.choice([0, self.rng.randint(0, request.counted)])
                request.computed = max(found, request.cached)
                self.events["preempt"] += 1
                self._hand_over(request)

    def _step(self, batch: list[Asked]) -> None:
        room = MAX_TOKENS // len(batch)
        spans, drafts = {}, {}
        for request in batch:
            left = len(request.ids) - request.computed
            spans[request.name] = (request.computed, self.rng.randint(1, min(left, room)))
            request.counted = max(request.counted, request.computed)
            if request.computed >= max(request.prompt_len, request.stands) and self.rng.random() < 0.8:
                drafts[request.name] = self.rng.randint(0, spans[request.name][1] - 1)
        accepted = {name: self.rng.randint(0, count) for name, count in drafts.items()}
        ids, streams = self._tokens(batch, spans, drafts, accepted)
        owners = [(name, at + i) for name, (at, count) in spans.items() for i in range(count)]
        rejected = {name: count - accepted[name] for name, count in drafts.items()}
        decided, aborts = self._forward(spans, drafts, ids, streams, owners)
        self._close_step(spans, rejected, accepted)
        for request in batch:
            begin, count = spans[request.name]
            lost = rejected.get(request.name, 0)
            self.events["reject"] += lost > 0
            self._settle(request, begin + count - lost, decided, aborts)
            request.uncertain = accepted.get(request.name, 0)
            request.counted = max(request.counted, request.computed - request.uncertain)

    def _tokens(
        self,
        batch: list[Asked],
        spans: Mapping[str, tuple[int, int]],
        drafts: Mapping[str, int],
        accepted: Mapping[str, int],
    ) -> tuple[list[int], dict[int, Tensor]]:
        """Ids and streams; in place of a request's own, any others where a draft will be rejected."""
        ids: list[int] = []
        streams: dict[int, list[Tensor]] = {point: [] for point in POINTS}
        generator = torch.Generator().manual_seed(self.rng.getrandbits(60))
        for request in batch:
            begin, count = spans[request.name]
            true = count - drafts.get(request.name, 0) + accepted.get(request.name, 0)
            ids += request.ids[begin : begin + true]
            ids += [self.rng.randint(0, 12) for _ in range(count - true)]
            for point in POINTS:
                streams[point].append(request.base[point][begin : begin + true])
                streams[point].append(torch.randn(count - true, D_MODEL, generator=generator))
        return ids, {point: torch.cat(parts) for point, parts in streams.items()}

    def _forward(
        self,
        spans: Mapping[str, tuple[int, int]],
        drafts: Mapping[str, int],
        ids: list[int],
        streams: dict[int, Tensor],
        owners: list[tuple[str, int]],
    ) -> tuple[set[tuple[str, int, int]], dict[str, int]]:
        """One pass. Returns: (request, position, row) of all that was decided, and what `aborts` says."""
        self._begin(spans, drafts, ids)
        decided = set()
        for point in POINTS:
            before = streams[point]
            addend = torch.full_like(before, 0.25) if point == 2 else None
            stream = before if addend is None else before - addend
            self.runtime.steer(point, stream, addend)
            for token, row in _applied(self.runtime, point, len(ids)):
                decided.add((*owners[token], row))
        return decided, self.runtime.aborts()

    def _close_step(
        self,
        spans: Mapping[str, tuple[int, int]],
        rejected: Mapping[str, int],
        accepted: Mapping[str, int],
    ) -> None:
        if isinstance(self.runtime, DeviceRuntime):
            stands = [at + count - rejected.get(name, 0) for name, (at, count) in spans.items()]
            self.runtime.settle(torch.tensor(stands))
        self.runtime.end_step()
        if isinstance(self.runtime, HostRuntime):
            self.runtime.accept(accepted)

    def _begin(self, spans: Mapping[str, tuple[int, int]], drafts: Mapping[str, int], ids: list[int]) -> None:
        begins, counts = (np.array(part, dtype=np.int32) for part in zip(*spans.values(), strict=True))
        if isinstance(self.runtime, HostRuntime):
            self.runtime.settle({name: begin for name, (begin, _) in spans.items()})
            speculative = np.array([drafts.get(name, 0) for name in spans], dtype=np.int32)
            self.runtime.begin_step(list(spans), counts, begins, np.array(ids, dtype=np.int32), speculative)
            return
        assert isinstance(self.runtime, DeviceRuntime)
        starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
        positions = torch.cat([torch.arange(at, at + n) for at, n in spans.values()])
        self.runtime.begin_step(list(spans), starts, positions, torch.tensor(ids, dtype=torch.int32))

    def _settle(
        self, request: Asked, stands: int, decided: set[tuple[str, int, int]], aborts: dict[str, int]
    ) -> None:
        again = {(at, row) for at, row in request.decided if at >= request.computed}
        anew = {(at, row) for name, at, row in decided if name == request.name and at < stands}
        assert {(at, row) for at, row in again if at < stands} <= anew, "computed again, it is the same"
        request.decided |= anew
        request.computed = stands
        request.stands = max(request.stands, stands)
        request.ended_at = aborts.get(request.name, END)
        expected = verdict(request, self.catalog)
        due = expected.ends if NEVER < expected.ends < stands else END
        # Of tokens that do not stand nothing is said here: the scheduler looks where a request stands.
        assert (request.ended_at if request.ended_at < stands else END) == due
        if due < END or stands == len(request.ids):
            self._end(request, expected)

    def _end(self, request: Asked, expected: Verdict) -> None:
        # The front end may have ended it before that, or know of no token behind it; and asks early or late.
        end = self.rng.randint(request.cached, request.stands + 2)
        is_asked_early = self.rng.random() < 0.5
        answer = self.runtime.collect({request.name: {request.name: end}}) if is_asked_early else {}
        self.runtime.remove(request.name)
        self.live.remove(request)
        stood = range(request.cached, request.stands)
        assert request.decided == {(at, row) for at, row in expected.decided if at in stood}
        answer = answer or self.runtime.collect({request.name: {request.name: end}})
        (rows,) = answer["tallies"][request.name]
        assert not answer["inexact"]
        last = expected.ends if NEVER < expected.ends < request.stands else request.stands
        received = range(request.cached, min(request.stands, last + 1, end))
        for number, (cached, since, tokens, *_) in enumerate(rows):
            row = request.plan.rows[number]
            known = since if since < request.stands else NEVER
            told = expected.since[number] if expected.since[number] < min(request.stands, end) else NEVER
            if row.effect != "hold":
                assert known == told
            assert tokens == sum(at in received for at, which in expected.decided if which == number)
            assert cached == sum(_selects(request, row, at) for at in range(request.cached))
            self.events["latch"] += row.latch and told != NEVER
        self.events["abort"] += request.stands < len(request.ids)


def _applied(runtime: Runtime, point: int, tokens: int) -> Iterator[tuple[int, int]]:
    """(token of the batch, row of its plan) of every row that applied at a hook point."""
    buffers, trace = runtime.buffers[point], runtime._trace[point]
    if isinstance(runtime, HostRuntime):
        n = runtime.tokens.count
        mapped = runtime.tokens.index[:n].tolist(), runtime.tokens.slot[:n].tolist()
        places = list(zip(*mapped, range(n), strict=True))
    else:
        assert isinstance(runtime, DeviceRuntime)
        slots = runtime._slot[:tokens].tolist()
        places = [(token, slot, token) for token, slot in enumerate(slots) if slot >= 0]
    for token, slot, at in places:
        used = int(buffers.count[slot])
        for k in torch.nonzero(~trace[at, :used, 0].isnan())[:, 0].tolist():
            if int(buffers.row[slot, k]) >= 0:
                yield token, int(buffers.row[slot, k])


def _drive(runtime: Runtime, catalog: Catalog, cases: range) -> dict[str, int]:
    """Every case has a seed of its own. Returns: how often each event happened."""
    events: dict[str, int] = {}
    for case in cases:
        rng = random.Random(case)
        requests = [random_request(rng, catalog, f"{case}-{i}") for i in range(rng.randint(1, 4))]
        scheduler = Scheduler(runtime, catalog, rng)
        scheduler.run(requests)
        for name, count in scheduler.events.items():
            events[name] = events.get(name, 0) + count
    assert runtime.collect({})["slots"]["in_use"] == 0
    return events


def _sizes() -> dict[str, int]:
    return {"max_requests": MAX_REQUESTS, "max_tokens": MAX_TOKENS, "vocab": VOCAB}


@pytest.mark.parametrize("hundred", range(10))
def test_a_request_is_decided_alike_however_it_is_scheduled(catalog: Catalog, hundred: int) -> None:
    runtime = HostRuntime(catalog, POINTS, **_sizes())
    events = _drive(runtime, catalog, range(100 * hundred, 100 * hundred + 100))
    assert min(events.values()) > 10


@contextmanager
def _interpreted_device(catalog: Catalog) -> Iterator[DeviceRuntime]:
    names = ("DeviceBatch", "count_triton", "fill_triton", "hold_triton", "note_triton", "steer_triton")
    with interpreted() as kernels, pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(steerserve.runtime.device, name, getattr(kernels, name))
        # What keeps the CPU's warm-ups cheap does not matter here.
        yield DeviceRuntime(catalog, POINTS, device="cpu", **_sizes())


def test_a_device_decides_as_the_host_does(catalog: Catalog) -> None:
    with _interpreted_device(catalog) as runtime:
        _drive(runtime, catalog, range(2))


@pytest.mark.slow
def test_a_device_decides_as_the_host_does_whatever_happens(catalog: Catalog) -> None:
    with _interpreted_device(catalog) as runtime:
        events = _drive(runtime, catalog, range(2, 12))
    assert min(events.values()) > 0
