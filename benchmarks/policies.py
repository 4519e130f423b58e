"""What policies cost: to admit a request, to serve it, and to text that they are not about.

python -m benchmarks.policies
"""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .admission import admission, write_policies
from .child import Child
from .command import RESULTS, leave_on_sigterm, progress_bar, publish
from .machine import load_average, machine, require_memory
from .rounds import order
from .settings import Setup, core_environment, vllm_setup
from .shapes import DEMO, SHAPES, prepare
from .summary import Spread
from .workload import Load, Variant, make_batch, sae_name

__all__ = ["main"]

_POLICIES, _INTERVENTIONS = 50, 16
# Of a card's features, those that are of its domain more often than not.
_PRECISE = 0.5
# What requests ask for themselves, with and without the policies beside it.
_ASKED = {"unsteered": Variant("idle", "plugin"), "steered": Variant("one", "plugin", plans=1)}


def _throughput(shape: str, load: Load, rounds: int) -> dict[str, Any]:
    """Output tokens per second with all policies enforced against all of them off, in turns, one engine."""
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar())
        task = bar.add_task("throughput", total=4 * (rounds + 1), detail="starting the engine")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steerserve-bench-")))
        served = prepare(SHAPES[shape], folder)
        write_policies(folder / "policies", _POLICIES, sae_name(0))
        setup = vllm_setup(served, 1, core_environment(0))
        setup.options["additional_config"]["steerserve"]["policies"] = str(folder / "policies")
        child = stack.enter_context(Child(setup, folder / "engine.log"))
        child.wait_until_ready()
        speeds: dict[str, list[float]] = {}
        turns = [(asked, mode) for asked in _ASKED for mode in ("off", "enforce")]
        for number in range(-1, rounds):
            for asked, mode in order(turns, max(number, 0)):
                bar.update(task, advance=1, detail=f"{asked}, {mode}")
                write_policies(folder / "policies", _POLICIES, sae_name(0), mode=mode)
                # A folder is looked at every half a second.
                time.sleep(1.0)
                seed = f"{asked}/{mode}/{number}"
                batch = make_batch(
                    _ASKED[asked], load, vocab=served.shape.vocab, d_sae=served.d_sae, seed=seed
                )
                result = child.turn({"batches": [_clear_of_policies(batch.wire)]})
                _check(result, asked, mode, load)
                if number >= 0:
                    speeds.setdefault(f"{asked}/{mode}", []).append(result["tokens"] / result["seconds"])
    return {"shape": shape, "load": asdict(load), "rounds": rounds, **_ratios(speeds)}


def _clear_of_policies(batch: dict[str, Any]) -> dict[str, Any]:
    """The same batch, with plans that touch nothing a policy holds."""
    for steering in batch["steering"]:
        for entry in (steering or {}).get("interventions", ()):
            entry["feature"] = (
                max(entry["feature"], _POLICIES)
                if entry["feature"] >= _POLICIES
                else (entry["feature"] + 4000)
            )
    return batch


def _check(result: dict[str, Any], asked: str, mode: str, load: Load) -> None:
    """A turn must have steered the rows of its plans and policies, on every token."""
    rows = (_POLICIES if mode == "enforce" else 0) + (load.rows if asked == "steered" else 0)
    expected = rows * load.requests * (load.prompt + load.output - 1)
    if result["steered"] != expected:
        raise RuntimeError(f"{asked}, {mode}: expected {expected} steered tokens, got {result['steered']}")


def _ratios(speeds: dict[str, list[float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for asked in _ASKED:
        off, on = speeds[f"{asked}/off"], speeds[f"{asked}/enforce"]
        ratios = [b / a for a, b in zip(off, on, strict=True)]
        found[asked] = {
            "tokens_per_second": asdict(Spread.of(on)),
            "ratio_to_no_policies": asdict(Spread.of(ratios)),
        }
    return found


def _side_effects(documents: int) -> dict[str, Any]:
    """Cross-entropy of held-out documents by domain, with a policy that ablates the insult features."""
    cards = json.loads((DEMO / "features.json").read_text(encoding="utf-8"))["insult"]
    features = sorted(item["feature"] for item in cards["features"] if item["precision"] >= _PRECISE)
    with tempfile.TemporaryDirectory(prefix="steerserve-bench-") as made:
        served = prepare(SHAPES["demo"], Path(made))
        policies = Path(made, "policies")
        policies.mkdir()
        saes = [{"name": "demo", "path": str(served.saes[0])}]
        options = {
            "model": str(served.model),
            "max_model_len": 512,
            "max_num_seqs": 32,
            "enforce_eager": True,
            "gpu_memory_utilization": 0.2,
            "additional_config": {"steerserve": {"saes": saes, "policies": str(policies)}},
        }
        environment = {**core_environment(0), "VLLM_PLUGINS": "steerserve"}
        with Child(Setup("benchmarks.side_effects", options, environment), Path(made, "log")) as child:
            child.wait_until_ready()
            turn = {"policies": str(policies), "features": features, "documents": documents}
            domains = child.turn(turn)
    for entry in domains.values():
        entry["change"] = round(entry["with"] / entry["without"] - 1, 5)
    others = [entry for domain, entry in domains.items() if domain != "insult"]
    tokens = sum(entry["tokens"] for entry in others)
    without, under = (sum(e["tokens"] * e[name] for e in others) / tokens for name in ("without", "with"))
    return {"features": features, "others_change": round(under / without - 1, 5), "domains": domains}


def main(
    shape: Annotated[
        str, typer.Option(help="The model served: half-billion, demo or tiny.")
    ] = "half-billion",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that are kept; one more warms up.")] = 7,
    samples: Annotated[int, typer.Option(min=100, help="Requests admitted.")] = 5000,
    documents: Annotated[int, typer.Option(min=1, help="Held-out documents read.")] = 300,
    parts: Annotated[str, typer.Option(help="Of admission, side_effects, throughput.")] = (
        "admission,side_effects,throughput"
    ),
    out: Annotated[Path, typer.Option(help="Where the JSON is kept, besides being printed.")] = (
        RESULTS / "policies.json"
    ),
) -> None:
    """Measure 50 policies of one held feature each, and requests of 16 interventions beside them, as JSON.

    Ratios are of turns in one engine, whose policies are switched off and on between them, in changing order.
    """
    leave_on_sigterm()
    before = load_average()
    wanted = parts.split(",")
    results: dict[str, Any] = {"machine": machine()}
    if "admission" in wanted:
        results["admission_microseconds"] = admission(_POLICIES, _INTERVENTIONS, samples)
    if "side_effects" in wanted:
        results["side_effects"] = _side_effects(documents)
    if "throughput" in wanted:
        require_memory(5.0, "an engine")
        results["throughput"] = _throughput(shape, replace(Load(), rows=_INTERVENTIONS), rounds)
    results["load_average"] = [before, load_average()]
    publish(results, out)


if __name__ == "__main__":
    typer.run(main)
