"""What steering costs while serving: vLLM with the plugin in several uses, against stock vLLM, in turns.

python -m benchmarks.serving && python -m benchmarks.table
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from .child import Child
from .command import ERROR, RESULTS, leave_on_sigterm, progress_bar, publish
from .machine import load_average, machine, require_memory
from .rounds import play
from .settings import core_environment, vllm_setup
from .shapes import SHAPES, Shape, prepare
from .summary import summarise
from .workload import ENGINES, VARIANTS, Load, Variant

__all__ = ["main", "measure"]

# What an engine takes on the larger model, all its processes together, and a little more.
ENGINE_GIB = 5.0
CHOICES = [variant.name for variant in VARIANTS if variant.engine not in ("stock", "control")]


class ShapeChoice(StrEnum):
    """Which models are measured."""

    DEMO = "demo"
    HALF_BILLION = "half-billion"
    BOTH = "both"


def measure(
    shape: Shape,
    variants: Sequence[Variant],
    load: Load,
    rounds: int,
    environment: dict[str, str],
    progress: Progress,
) -> dict[str, Any]:
    """The variants on one model, each engine started once.

    Args: environment: variables for every engine.
    Returns: the model's part of the results.
    """
    task = progress.add_task(shape.name, total=(rounds + 1) * len(variants), detail="writing weights")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steerserve-bench-")))
        served = prepare(shape, folder, hooked=max(1, *(variant.hooked for variant in variants)))
        children: dict[str, Child] = {}
        engines: dict[str, Any] = {}
        for name in dict.fromkeys(variant.engine for variant in variants):
            progress.update(task, detail=f"starting engine {name}")
            require_memory(ENGINE_GIB, f"engine {name}")
            setup = vllm_setup(served, ENGINES[name], environment)
            children[name] = stack.enter_context(Child(setup, folder / f"{name}.log"))
            engines[name] = children[name].wait_until_ready()

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
    shape: Annotated[
        ShapeChoice,
        typer.Option(help="Which model: the demo's, random weights in the shape of Qwen2.5-0.5B, or both."),
    ] = ShapeChoice.BOTH,
    variants: Annotated[
        str,
        typer.Option(
            help="What to measure against stock vLLM, with commas between. `layers16` needs a model of "
            "that many layers and is left out elsewhere."
        ),
    ] = ",".join(CHOICES),
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds that are kept; one more warms up. A round is one turn of each.")
    ] = 7,
    requests: Annotated[int, typer.Option(min=1, max=64, help="Requests of a batch.")] = 64,
    prompt: Annotated[int, typer.Option(min=1, max=400, help="Tokens of each prompt.")] = 64,
    output: Annotated[int, typer.Option(min=1, max=64, help="Tokens generated for each request.")] = 48,
    rows: Annotated[
        int, typer.Option(min=1, max=16, help="Interventions of each plan; with `layers16`, one a layer.")
    ] = 8,
    reserved_cores: Annotated[
        int,
        typer.Option(
            min=0,
            help="Cores that vLLM leaves to its front end (VLLM_CPU_NUM_OF_RESERVED_CPU); the rest compute. "
            "0: all of them do.",
        ),
    ] = 0,
    control: Annotated[
        bool,
        typer.Option(help="Also run stock vLLM a second time: what its ratio differs from 1 by is noise."),
    ] = True,
    small: Annotated[
        bool,
        typer.Option(
            "--small", help="A tiny model, tiny turns, one round, nothing kept: does everything run?"
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the JSON is kept, besides being printed, if not in results/serving.json."),
    ] = None,
) -> None:
    """Measure output tokens per second of stock vLLM and of vLLM with steerserve, as JSON.

    Each engine lives in its own process and is stopped while another works; with all variants four of them
    live, about 4.5 GiB each on the larger model. Every round gives each variant one turn, in changing order;
    ratios are taken within a round. Nothing is asserted about speed, but a turn that steered any other number
    of tokens than its plans name ends the run.
    """
    leave_on_sigterm()
    chosen = _chosen(variants, control=control)
    environment = core_environment(reserved_cores)
    names = ["demo", "half-billion"] if shape is ShapeChoice.BOTH else [shape.value]
    if small:
        names, rounds, prompt, output = ["tiny"], 1, 16, 8
    found = []
    with progress_bar() as progress:
        for one in (SHAPES[name] for name in names):
            own = [variant for variant in chosen if variant.hooked <= len(one.layers)]
            load = Load(requests, prompt, output, rows, one.batches)
            found.append(measure(one, own, load, rounds, environment, progress))
            _say(found[-1])
    results = {"machine": machine(), "environment": environment, "rounds": rounds, "models": found}
    publish(results, out or (None if small else RESULTS / "serving.json"))


def _chosen(names: str, *, control: bool) -> list[Variant]:
    wanted = {name.strip() for name in names.split(",")}
    if unknown := wanted - set(CHOICES):
        expected = ", ".join(CHOICES)
        raise typer.BadParameter(
            f"expected some of {expected}, got {', '.join(sorted(unknown))}", param_hint="--variants"
        )
    wanted |= {"stock", "control"} if control else {"stock"}
    return [variant for variant in VARIANTS if variant.name in wanted]


def _say(result: dict[str, Any]) -> None:
    """One line for each variant on stderr."""
    for name, figures in result["variants"].items():
        verdict = {None: "", True: "  target met", False: "  TARGET MISSED"}[figures["met"]]
        goal = "" if figures["target"] is None else f" (target {figures['target']:.2f})"
        speed, ratio = figures["tokens_per_second"]["median"], figures["ratio"]["median"]
        ERROR.print(f"{result['name']:>13} {name:>9} {speed:9.1f} tokens/s  ratio {ratio:.3f}{goal}{verdict}")


if __name__ == "__main__":
    typer.run(main)
