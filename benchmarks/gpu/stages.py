"""What a borrowed GPU is asked, one question a process: `python -m benchmarks.gpu.stages NAME --device cuda`.

Each prints what it found as one line of JSON. With `--device cpu` the kernels run in Triton's interpreter, on
sizes that it can do: what can go wrong without a GPU has then gone wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steerserve.compile import compile_plan
from steerserve.runtime.device import DeviceRuntime
from steerserve.spec import parse_spec

from .catalog import small_catalog

__all__ = ["STAGES", "main"]

_WIDTHS = (896, 2048, 3584, 4096, 5120, 8192)
_ROWS = (1, 8, 32, 96)
_VOCAB = 320
# A feature of every kind of activation, every op and a condition.
_EVERYTHING: list[dict[str, Any]] = [
    {"sae": "jump", "feature": 3, "op": "clamp", "value": 2.0},
    {"sae": "gate", "feature": 5, "op": "scale", "value": -1.5},
    {"sae": "std", "feature": 7, "op": "ablate"},
    {"sae": "std", "feature": 8, "op": "at_most", "value": 0.5},
    {"direction": "north", "op": "add", "value": 4.0},
    {"sae": "jump", "feature": 9, "op": "at_least", "value": 1.0,
     "when": [{"sae": "std", "feature": 1, "above": 0.2}]},
]  # fmt: skip


def start(device: str) -> dict[str, Any]:
    """A plan of everything is written to the device, and one request is added, stepped and removed."""
    devices = [device] if device != "cpu" else ["meta", "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        catalog = small_catalog(Path(folder), 64)
        plan = compile_plan(parse_spec({"interventions": _EVERYTHING}), catalog)
        for place in devices:
            runtime = DeviceRuntime(
                catalog, (2, 3), max_requests=4, max_tokens=16, vocab=_VOCAB, device=place
            )
            for point, buffers in runtime.buffers.items():
                buffers.write(0, plan, point, catalog)
        prompt = torch.arange(3, 8)
        runtime.add("a", plan.wire, prompt.numpy(), "a", 0)
        moved = partial(torch.Tensor.to, device=torch.device(device))
        runtime.begin_step(
            ["a"], moved(torch.tensor([0, 5], dtype=torch.int32)), moved(torch.arange(5)), moved(prompt.int())
        )
        stream = torch.randn(5, 64).to(device)
        before = stream.clone()
        for point in (2, 3):
            runtime.steer(point, stream, None)
        runtime.settle()
        runtime.end_step()
        runtime.remove("a")
        (tally,) = runtime.collect({"a": {}})["tallies"]["a"]
    assert not torch.equal(stream, before), "nothing was steered"
    assert [row[2] for row in tally][:5] == [5] * 5, "not every token was counted"
    return {"devices": devices, "counted": [row[2] for row in tally]}


def kernels(device: str) -> dict[str, Any]:
    """The kernels against their reference, over widths, rows and types."""
    from .kernel import check

    widths, rows = (_WIDTHS, _ROWS) if device != "cpu" else ((128,), (1, 96))
    cases = [(width, row, (i + j) % 2 == 0) for i, width in enumerate(widths) for j, row in enumerate(rows)]
    found = [one for case in cases for one in check(*case, device=device)]
    wrong = [one for one in found if not one["ok"]]
    assert not wrong, f"the kernel is wrong: {wrong}"
    return {"checked": len(found), "largest_error": max(one["error"] for one in found)}


def schedule(device: str) -> dict[str, Any]:
    """The scheduler of whims of the unit tests: what a runtime decides against plain Python."""
    from tests.support.models import D_MODEL
    from tests.unit import test_history as history

    class OnDevice(history.Scheduler):
        """Its steps' tensors lie where the model runner's would."""

        def _begin(self, spans: Any, drafts: Any, ids: list[int]) -> None:
            runtime: Any = self.runtime
            begin_step = runtime.begin_step
            runtime.begin_step = lambda names, *parts: begin_step(names, *(p.to(device) for p in parts))
            super()._begin(spans, drafts, ids)
            del runtime.begin_step

        def _forward(self, spans: Any, drafts: Any, ids: Any, streams: Any, owners: Any) -> Any:
            there = {point: stream.to(device) for point, stream in streams.items()}
            return super()._forward(spans, drafts, ids, there, owners)

        def _close_step(self, spans: Any, rejected: Any, accepted: Any) -> None:
            runtime: Any = self.runtime
            settle = runtime.settle
            runtime.settle = lambda *now: settle(*(part.to(device) for part in now))
            super()._close_step(spans, rejected, accepted)
            del runtime.settle

    events: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        catalog = small_catalog(Path(folder), D_MODEL)
        runtime = DeviceRuntime(catalog, history.POINTS, device=device, **history._sizes())
        for case in range(100 if device != "cpu" else 2):
            rng = random.Random(case)
            scheduler = OnDevice(runtime, catalog, rng)
            scheduler.run(
                [history.random_request(rng, catalog, f"{case}-{i}") for i in range(rng.randint(1, 4))]
            )
            events += Counter(scheduler.events)
    return dict(events)


def replay(device: str) -> dict[str, Any]:
    """A small decoder from CUDA graphs against the same run eagerly, over requests that come and go."""
    from .replaying import run

    return run(device, steps=500 if device != "cpu" else 8)


def waits(device: str) -> dict[str, Any]:
    """The same, listing where the host waited for the device."""
    from .replaying import run

    if device == "cpu":
        return {"absent": "torch only sees waits for a GPU"}
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(device, steps=100)
    torch.cuda.set_sync_debug_mode("default")
    root = str(Path(__file__).parents[2])
    places = Counter(
        f"{w.filename.removeprefix(root)}:{w.lineno}" for w in said if "synchroniz" in str(w.message)
    )
    return {"waits": places.most_common(30)}


def smallest(device: str) -> dict[str, Any]:
    """A few launches of every kernel, for compute-sanitizer, which makes each a hundred times slower."""
    found = start(device)
    from .kernel import check

    wrong = [one for one in check(128, 8, True, device=device) if not one["ok"]]
    assert not wrong, wrong
    return found


STAGES: dict[str, Callable[[str], dict[str, Any]]] = {
    stage.__name__: stage for stage in (start, kernels, schedule, replay, waits, smallest)
}


def main() -> None:
    """Run the stage that is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.stages", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    given = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        found = STAGES[given.stage](given.device)
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main()
