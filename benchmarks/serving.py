"""What steering costs while serving: stock vLLM, the plugin idle, one plan, 32 plans, in turns in one run.

python -m benchmarks.serving --out results.json && python -m benchmarks.table results.json
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .child import Child
from .machine import load_average, machine
from .rounds import play
from .shapes import SHAPES, Shape, prepare
from .summary import summarise
from .workload import VARIANTS, Load

__all__ = ["main", "measure"]

QUICK = Load(prompt=16, output=8)
QUICK_ROUNDS = 2
_ERROR = Console(stderr=True, highlight=False, soft_wrap=True)


class ModelChoice(StrEnum):
    """Which models are measured."""

    DEMO = "demo"
    HALF_BILLION = "half-billion"
    BOTH = "both"


def measure(
    shape: Shape, load: Load, rounds: int, *, control: bool, environment: dict[str, str], progress: Progress
) -> dict[str, Any]:
    """All variants on one model.

    Args:
        control: run a second stock engine too; how far its ratio is from 1 is the measurement's own error.
        environment: variables for every engine.
    Returns: the model's part of the results.
    """
    variants = [variant for variant in VARIANTS if control or variant.engine != "control"]
    task = progress.add_task(shape.name, total=(rounds + 1) * len(variants), detail="starting engines")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steerserve-bench-")))
        served = prepare(shape, folder)
        children: dict[str, Child] = {}
        engines: dict[str, Any] = {}
        for name in dict.fromkeys(variant.engine for variant in variants):
            log = folder / f"{name}.log"
            child = Child(served, plugin=name == "plugin", environment=environment, log=log)
            children[name] = stack.enter_context(child)
            engines[name] = child.wait_until_ready()

        def advance(variant: str) -> None:
            progress.update(task, advance=1, detail=variant)

        load_before = load_average()
        turns = play(children, variants, served, load, rounds, advance)
        load_after = load_average()
        progress.update(task, detail="done")
    return {
        **served.record,
        "engines": engines,
        "load": asdict(load),
        "load_average": [load_before, load_after],
        "variants": summarise(turns, shape.targets),
        "turns": [asdict(turn) for turn in turns],
    }


def main(
    model: Annotated[ModelChoice, typer.Option(help="Which model to measure.")] = ModelChoice.BOTH,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds that are kept; one more warms up. A round is one turn of each.")
    ] = 7,
    requests: Annotated[int, typer.Option(min=1, max=32, help="Requests of a batch.")] = 32,
    prompt: Annotated[int, typer.Option(min=1, max=400, help="Tokens of each prompt.")] = 64,
    output: Annotated[int, typer.Option(min=1, max=64, help="Tokens generated for each request.")] = 48,
    rows: Annotated[int, typer.Option(min=1, max=16, help="Interventions of each plan.")] = 8,
    reserved_cores: Annotated[
        int,
        typer.Option(
            min=0,
            help="Cores that vLLM leaves to its front end (VLLM_CPU_NUM_OF_RESERVED_CPU); the rest compute.",
        ),
    ] = 0,
    control: Annotated[
        bool,
        typer.Option(help="Also run stock vLLM a second time: what its ratio differs from 1 by is noise."),
    ] = True,
    quick: Annotated[bool, typer.Option(help="Tiny turns and two rounds: does everything run?")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here instead of to stdout.")] = None,
) -> None:
    """Measure output tokens per second of stock vLLM and of vLLM with steerserve, as JSON.

    Each engine lives in its own process and is stopped while another works. Every round gives each variant
    one turn, in changing order; ratios are taken within a round. Nothing is asserted about speed, but a turn
    that steered any other number of tokens than its plans name ends the run.
    """
    # An engine that is stopped would outlive us: leave by the way that ends them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    environment = {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": str(reserved_cores),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    load = replace(QUICK, rows=rows) if quick else Load(requests, prompt, output, rows)
    names = [ModelChoice.DEMO, ModelChoice.HALF_BILLION] if model is ModelChoice.BOTH else [model]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found = []
    with Progress(*columns, TextColumn("{task.fields[detail]}"), console=_ERROR) as progress:
        for name in names:
            shape = SHAPES[name]
            own = replace(load, batches=1 if quick else shape.batches)
            kept = QUICK_ROUNDS if quick else rounds
            found.append(
                measure(shape, own, kept, control=control, environment=environment, progress=progress)
            )
            _say(found[-1])
    results = {"machine": machine(), "environment": environment, "rounds": kept, "models": found}
    text = json.dumps(results, indent=1) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")


def _say(result: dict[str, Any]) -> None:
    """One line for each variant on stderr."""
    for name, figures in result["variants"].items():
        verdict = {None: "", True: "  target met", False: "  TARGET MISSED"}[figures["met"]]
        goal = "" if figures["target"] is None else f" (target {figures['target']:.2f})"
        speed, ratio = figures["tokens_per_second"]["median"], figures["ratio"]["median"]
        _ERROR.print(
            f"{result['name']:>13} {name:>9} {speed:9.1f} tokens/s  ratio {ratio:.3f}{goal}{verdict}"
        )


if __name__ == "__main__":
    typer.run(main)
