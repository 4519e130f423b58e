"""The device's runtime as a GPU would run it: recorded launches, nothing compiled late, nothing read back."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steerserve.catalog import Catalog, build_catalog
from steerserve.compile import compile_plan
from steerserve.config import DirectionConfig, SaeConfig, SteerserveConfig
from steerserve.plan import Plan
from steerserve.runtime.device import DeviceRuntime
from steerserve.sae import Direction, Hook, write_direction
from steerserve.spec import parse_spec
from steerserve.steer import PointBuffers
from steerserve.tally import MAX_ENDED
from tests.support.models import D_MODEL, N_LAYERS, VOCAB
from tests.support.saes import make_sae, make_trained
from tests.unit.device_worker import MAX_REQUESTS, MAX_TOKENS, SIZES, Worker
from tests.unit.steer.interpreting import interpreted
from tests.unit.steer.launches import KERNELS, Launch, Launches, watched
from tests.unit.test_history import random_request

pytestmark = pytest.mark.interpreted

POINTS = (2, 3)


def _runtime(catalog: Catalog, device: str = "cpu") -> DeviceRuntime:
    sizes = {"max_requests": MAX_REQUESTS, "max_tokens": MAX_TOKENS, "vocab": VOCAB}
    return DeviceRuntime(catalog, POINTS, device=device, **sizes)


@pytest.fixture(scope="module")
def plans(catalog: Catalog) -> list[Plan]:
    """More than there are slots: they edit, latch, hold, observe, ask earlier points, and end requests."""
    rng = random.Random(0)
    found = [random_request(rng, catalog, "any").plan for _ in range(5 * MAX_REQUESTS)]
    rows = [row for plan in found for row in plan.rows]
    assert {"edit", "force", "hold", "observe", "abort"} == {row.effect for row in rows}
    assert any(row.latch for row in rows)
    assert any(row.earlier for row in rows)
    return found


# A device whose memory nobody can read.


class _Crossings(TorchDispatchMode):
    """Counts what is read from a `meta` device, as zeros, and refuses to send there what would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.sent = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and "device" in kwargs:
            source, target = args[0], torch.device(kwargs["device"])
            if source.device.type == "meta" and target.type == "cpu":
                self.read += 1
                return torch.zeros(source.shape, dtype=source.dtype)
            if target.type == "meta":
                assert kwargs.get("non_blocking"), "a copy to the device that is waited for"
                self.sent += 1
        if func is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            raise AssertionError("a copy between host and device inside of a step")
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """Every activation: of formulas, of whole SAEs, and the identity of a direction."""
    folder = tmp_path_factory.mktemp("kinds")
    alone = ("standard", "jumprelu", "gated", "batchtopk")
    saes = [SaeConfig(name=kind, path=make_sae(folder / kind, kind, 2)) for kind in alone]
    whole = {"topk": make_sae(folder / "topk", "topk", 2)}
    whole |= {kind: make_trained(folder / kind, kind, 2) for kind in ("kron", "switch", "vaease")}
    saes += [SaeConfig(name=kind, path=path, resident=True) for kind, path in whole.items()]
    unit = torch.nn.functional.normalize(torch.ones(D_MODEL), dim=0)
    statistics = {"max_activation": 12.0}
    path = folder / "north.safetensors"
    write_direction(path, Direction("north", unit, Hook(2, "resid_post"), statistics))
    config = SteerserveConfig(saes=saes, directions=[DirectionConfig(name="north", path=path)])
    return build_catalog(config, n_layers=N_LAYERS, d_model=D_MODEL)


def test_a_plan_of_every_activation_is_written_to_a_device(every_kind: Catalog) -> None:
    buffers = PointBuffers(4, every_kind.rows_per_point, D_MODEL, "meta")
    names = [{"sae": source.name, "feature": 3} for source in every_kind.saes] + [{"direction": "north"}]
    assert len(names) == 9
    with _Crossings() as crossings:
        for slot, name in enumerate(names):
            for error in ["keep", "drop"] if name.get("sae") in ("topk", "kron") else ["keep"]:
                spec = {"interventions": [{**name, "op": "clamp", "value": 2.0}], "error": error}
                buffers.write(slot % 4, compile_plan(parse_spec(spec), every_kind), 3, every_kind)
    assert (crossings.sent, crossings.read) == (len(names) + 2, 0)


def test_plans_that_latch_ask_hold_and_end_are_written_to_a_device(
    catalog: Catalog, plans: list[Plan]
) -> None:
    for point in POINTS:
        buffers = PointBuffers(4, catalog.rows_per_point, D_MODEL, "meta")
        with _Crossings() as crossings:
            for number, plan in enumerate(plans):
                buffers.write(number % 4, plan, point, catalog)
        assert crossings.read == 0
        assert 0 < crossings.sent <= len(plans), "one copy for each plan that has rows here"


def test_a_random_schedule_on_a_device_reads_nothing_back(catalog: Catalog, plans: list[Plan]) -> None:
    with watched() as launches:
        runtime = _runtime(catalog, "meta")
        runtime.warm_up(torch.bfloat16)
        worker = Worker(runtime, plans, seed=1)
        stream = torch.zeros(MAX_TOKENS, D_MODEL, dtype=torch.bfloat16, device="meta")
        with _Crossings() as crossings:
            for _ in range(60):
                step = worker.begin()
                for point in POINTS:
                    runtime.steer(point, stream[: step.size], stream[: step.size])
                worker.finish()
    assert worker.most_live > MAX_REQUESTS, "the tallies have grown"
    assert {launch.kernel for launch in launches.seen} == set(KERNELS)
    assert crossings.read == 0
    assert crossings.sent > 100


def test_a_report_is_read_back_at_once_however_many_requests_have_ended(catalog: Catalog) -> None:
    plan = compile_plan(
        parse_spec({"interventions": [{"sae": "jump", "feature": 3, "op": "ablate"}]}), catalog
    )
    with watched():
        runtime = _runtime(catalog, "meta")
        with _Crossings() as crossings:
            for number in range(2 * MAX_ENDED + 101):
                ticket = str(number) if number < 100 else ""
                runtime.add(str(number), plan.wire, np.arange(3, 9), ticket, 0)
                runtime.remove(str(number))
            assert crossings.read == 2, "one for each thousand, which nobody waits for"
            runtime.add("live", plan.wire, np.arange(3, 9), "live", 0)
            told = runtime.collect({str(number): {} for number in range(100)} | {"live": {}})
    assert set(told["requests"].values()) == {1}
    # Tables, notes, and the last tokens with their places; and the counts of those that were not sent yet.
    assert crossings.read <= 2 + 5


def test_what_ends_a_request_is_read_once_for_a_whole_batch_that_is_waited_for(catalog: Catalog) -> None:
    abort = {"then": "abort", "when": {"sae": "jump", "feature": 3, "above": 1.0}}
    plan = compile_plan(parse_spec({"interventions": [abort]}), catalog)
    with watched():
        runtime = _runtime(catalog, "meta")
        for name in ("a", "b"):
            runtime.add(name, plan.wire, np.arange(3, 7), name, 0)
        starts, positions, ids = (torch.zeros(n, dtype=torch.int32, device="meta") for n in (4, 6, 6))
        with _Crossings() as crossings:
            runtime.begin_step(["a", "plain", "b"], starts, positions.long(), ids)
            assert crossings.read == 0
            # All zeros there, as if every condition had held at once.
            assert runtime.aborts() == {"a": 0, "b": 0}
    assert crossings.read == 1


def test_a_report_may_be_asked_for_outside_of_inference_mode(catalog: Catalog, plans: list[Plan]) -> None:
    with watched():
        with torch.inference_mode():
            runtime = _runtime(catalog)
            for number in range(MAX_REQUESTS + 2):
                runtime.add(str(number), plans[0].wire, np.arange(3, 9), str(number), 0)
            starts, ids = torch.tensor([0, 6], dtype=torch.int32), torch.arange(3, 9, dtype=torch.int32)
            runtime.begin_step(["0"], starts, torch.arange(6), ids)
        assert len(runtime.tallies.table) > MAX_REQUESTS, "the tallies have grown"
        assert runtime.collect({"0": {}})["requests"] == {"0": 1}


# A graph is recorded once and replayed.


@dataclass
class Graphs:
    """For each size what one forward pass launches, on streams that stay where they are."""

    runtime: DeviceRuntime
    launches: Launches
    streams: dict[int, Tensor]
    addend: Tensor
    recorded: dict[int, list[Launch]]

    @classmethod
    def record(cls, runtime: DeviceRuntime, launches: Launches) -> Graphs:
        """As vLLM does at start-up: nothing is steered yet."""
        streams = {point: torch.zeros(MAX_TOKENS, D_MODEL) for point in POINTS}
        graphs = cls(runtime, launches, streams, torch.zeros(MAX_TOKENS, D_MODEL), {})
        for size in SIZES:
            graphs.recorded[size] = graphs.fresh(size)
        return graphs

    def fresh(self, size: int) -> list[Launch]:
        """A forward pass that calls the op, and what it launched."""
        before = len(self.launches.seen)
        for point in POINTS:
            addend = self.addend[:size] if point == POINTS[0] else None
            # What `steer` does on a GPU, whether anything is steered or not.
            self.runtime._launch(point, self.streams[point][:size], addend)
        return self.launches.seen[before:]

    def state(self) -> dict[str, Tensor]:
        """All that a forward pass may change."""
        own = {"rows": self.runtime._rows, "since": self.runtime._since, "slot": self.runtime._slot}
        for point in POINTS:
            own |= {f"stream {point}": self.streams[point], f"trace {point}": self.runtime._trace[point]}
        return own

    def check(self, size: int) -> dict[str, Tensor]:
        """Replay a step, and hold what it did to what the op does. Returns: what the replay left."""
        before = {name: part.clone() for name, part in self.state().items()}
        self.launches.replay(self.recorded[size])
        replayed = {name: part.clone() for name, part in self.state().items()}
        for name, part in self.state().items():
            part.copy_(before[name])
        fresh = self.fresh(size)
        assert [one.recorded for one in fresh] == [one.recorded for one in self.recorded[size]]
        for name, part in self.state().items():
            assert torch.equal(_bits(part), _bits(replayed[name])), name
        return replayed


def _bits(part: Tensor) -> Tensor:
    return part.view(torch.int32) if part.dtype is torch.float32 else part


def _check_replays(catalog: Catalog, plans: list[Plan], seed: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    steered = idle = 0
    with interpreted() as kernels, watched(kernels) as launches, np.errstate(all="ignore"):
        runtime = _runtime(catalog)
        runtime.warm_up(torch.float32)
        graphs, worker = Graphs.record(runtime, launches), Worker(runtime, plans, seed)
        for _ in range(steps):
            step = worker.begin()
            for stream in (*graphs.streams.values(), graphs.addend):
                stream.normal_(generator=generator)
                # Padding: what earlier steps left there.
                stream[step.tokens :] = torch.nan
            before = graphs.streams[POINTS[-1]].clone()
            after = graphs.check(step.size)[f"stream {POINTS[-1]}"]
            moved = ~torch.eq(_bits(before), _bits(after)).all(dim=1)
            assert not moved[step.tokens :].any(), "padding is left alone"
            steered += int(moved.sum())
            worker.finish()
            if not runtime._marked:
                # What another replica's step makes this one run.
                idle_before = {point: graphs.streams[point].clone() for point in POINTS}
                graphs.check(SIZES[0])
                assert all(torch.equal(_bits(idle_before[p]), _bits(graphs.streams[p])) for p in POINTS)
                idle += 1
        assert len(launches.seen) > 0
    assert worker.most_live > MAX_REQUESTS, "the tallies have grown"
    assert min(steered, idle) > 0, (steered, idle)


def test_a_recorded_step_does_what_a_fresh_one_does(catalog: Catalog, plans: list[Plan]) -> None:
    _check_replays(catalog, plans, seed=0, steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_recorded_steps_do_what_fresh_ones_do(catalog: Catalog, plans: list[Plan], seed: int) -> None:
    _check_replays(catalog, plans, seed, steps=60)


# Triton compiles a kernel anew for other types, sizes and alignments of its arguments.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_is_compiled_after_the_warm_up(
    catalog: Catalog, plans: list[Plan], dtype: torch.dtype
) -> None:
    with watched() as launches:
        runtime = _runtime(catalog)
        runtime.warm_up(dtype)
        assert {name for name, _ in launches.compiled} == set(KERNELS)
        launches.compiled.clear()
        worker, stream = Worker(runtime, plans, seed=2), torch.zeros(MAX_TOKENS, D_MODEL, dtype=dtype)
        for _ in range(60):
            step = worker.begin()
            for point in POINTS:
                runtime.steer(point, stream[: step.size], stream[: step.size] if point == 2 else None)
            worker.finish()
    assert worker.most_live > MAX_REQUESTS
    assert not launches.compiled


def test_a_kernel_that_is_compiled_late_is_seen(catalog: Catalog) -> None:
    with watched() as launches:
        runtime = _runtime(catalog)
        runtime.warm_up(torch.bfloat16)
        launches.compiled.clear()
        runtime._launch(2, torch.zeros(4, D_MODEL), None)
        runtime._launch(2, torch.zeros(4, D_MODEL, dtype=torch.bfloat16), None)
        runtime._launch(2, torch.zeros(4 * D_MODEL + 1, dtype=torch.bfloat16)[1:].view(4, D_MODEL), None)
    assert [name for name, _ in launches.compiled] == ["note", "steer", "hold"] * 2
