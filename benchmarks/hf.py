"""steerserve beside the usual way to steer by features: transformers with a hook that runs the whole SAE.

python -m benchmarks.hf && python -m benchmarks.table
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from .arrivals import Traffic
from .command import ERROR, RESULTS, leave_on_sigterm, progress_bar, publish
from .latency import summarise_timed
from .machine import load_average, machine
from .settings import core_environment
from .shapes import SHAPES, Shape, prepare, write_weights
from .sides import BASE, SIDES, check, play, running

__all__ = ["main", "measure"]

DTYPE, CHECK_DTYPE = "bfloat16", "float32"
CHECKS = 4


def measure(
    shape: Shape, d_sae: int, traffic: Traffic, batch: int, rounds: int, progress: Progress
) -> dict[str, Any]:
    """All sides in turns, then the check of their tokens in float32.

    Args: batch: the most requests that transformers takes at once.
    Returns: the results, but for the machine.
    """
    task = progress.add_task(shape.name, total=(rounds + 1) * len(SIDES) + CHECKS, detail="writing weights")

    def say(detail: str) -> None:
        progress.update(task, detail=detail)

    def advance(detail: str) -> None:
        progress.update(task, advance=1, detail=detail)

    with tempfile.TemporaryDirectory(prefix="steerserve-bench-") as name:
        folder = Path(name)
        served = write_weights(prepare(shape, folder, d_sae=d_sae))
        with running(served, DTYPE, batch, folder, say) as (children, processes):
            load_before = load_average()
            turns, agreements = play(children, served, traffic, rounds, advance)
            load_after = load_average()
        few = Traffic(requests=8, plans=8, rows=traffic.rows, rate=1e3, output=traffic.output)
        with running(served, CHECK_DTYPE, batch, folder, say) as (children, _):
            checked = check(children, served, few, advance)
        say("done")
    return {
        "shape": served.record,
        "processes": processes,
        "traffic": asdict(traffic),
        "load_average": [load_before, load_after],
        "sides": summarise_timed(turns, BASE),
        "agreement": {DTYPE: agreements, CHECK_DTYPE: checked},
        "turns": [asdict(turn) for turn in turns],
    }


def main(
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds that are kept, a turn of each side; a short one warms up.")
    ] = 3,
    requests: Annotated[int, typer.Option(min=2, max=1024, help="Requests of a turn.")] = 64,
    plans: Annotated[int, typer.Option(min=1, help="Distinct plans among them.")] = 32,
    rate: Annotated[
        float,
        typer.Option(
            min=0.01, help="Requests that come each second, on average. Too few, and the sides only wait."
        ),
    ] = 8.0,
    d_sae: Annotated[int, typer.Option(min=8, help="Features of the SAE.")] = 16_384,
    hf_batch: Annotated[
        int, typer.Option(min=1, help="The most requests that transformers takes in one batch.")
    ] = 16,
    small: Annotated[
        bool,
        typer.Option(
            "--small", help="A tiny model and SAE, few requests, one round, nothing kept: does all run?"
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the JSON is kept, besides being printed, if not in results/hf.json."),
    ] = None,
) -> None:
    """Measure the same steered requests, coming over time, through vLLM with steerserve and through
    transformers with SAELens' SAE in a hook, as JSON.

    Both run on all cores that this process may use, with the same weights and dtype (bfloat16); one is
    stopped while the other works. Afterwards a few requests are run in float32:
    the tokens should be the same.
    """
    leave_on_sigterm()
    shape = SHAPES["half-billion"]
    traffic = Traffic(requests=requests, plans=plans, rate=rate)
    if small:
        shape, d_sae, rounds = SHAPES["tiny"], 1024, 1
        traffic = Traffic(requests=8, plans=4, rate=rate, prompt=(8, 32), output=(4, 16))
    with progress_bar() as progress:
        found = measure(shape, d_sae, traffic, hf_batch, rounds, progress)
    for name, figures in found["sides"].items():
        speed, ratio = figures["tokens_per_second"]["median"], figures["ratio"]["median"]
        ERROR.print(f"{name:>13} {speed:9.1f} tokens/s  {ratio:.2f} × {BASE}")
    results = {"machine": machine(), "environment": core_environment(0), "rounds": rounds, **found}
    publish(results, out or (None if small else RESULTS / "hf.json"))


if __name__ == "__main__":
    typer.run(main)
