"""Milliseconds of one training step: steerserve, SAELens and sparsify in turns on the same cores, as JSON.

python -m benchmarks.training && python -m benchmarks.table
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from .command import RESULTS, progress_bar, publish
from .machine import load_average, machine
from .rounds import order
from .summary import Spread
from .trainers import ARCHITECTURES, Size, planted, sides

__all__ = ["main", "measure"]

# glibc gives big blocks back to the system after a step, and pays for their pages again; "tuned" forbids it.
ALLOCATORS = {
    "default": {},
    "tuned": {"MALLOC_MMAP_THRESHOLD_": str(2**40), "MALLOC_TRIM_THRESHOLD_": str(2**40)},
}
WIDTHS = (1024, 2048, 4096, 8192, 16_384, 32_768)
WARM_UP = 3
BATCHES = 4


def measure(size: Size, names: tuple[str, ...], rounds: int, progress: Progress) -> dict[str, list[float]]:
    """Seconds of each side's steps, one step a round."""
    batches, trainers = planted(size, BATCHES), sides(size, names)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    task = progress.add_task(f"F = {size.features}", total=(rounds + WARM_UP) * len(trainers), detail="")
    for number in range(-WARM_UP, rounds):
        for name in order(list(trainers), max(number, 0)):
            progress.update(task, advance=1, detail=name)
            x = batches[number % BATCHES]
            began = perf_counter()
            trainers[name](x)
            if number >= 0:
                seconds[name].append(perf_counter() - began)
    return seconds


def summarise(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Milliseconds of each side, and how often as long as ours it took in the same round."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in seconds.items():
        found[name] = {"milliseconds": asdict(Spread.of([s * 1e3 for s in own]))}
        base = f"ours/{name.partition('/')[2].partition('@')[0]}"
        others = {"ratio": base}
        if f"{base}@" in " ".join(seconds):
            others["ratio_sparse"] = next(key for key in seconds if key.startswith(f"{base}@"))
        if not name.startswith("ours/"):
            for key, other in others.items():
                pairs = zip(own, seconds[other], strict=True)
                found[name][key] = asdict(Spread.of([theirs / ours for theirs, ours in pairs]))
    return found


def run_child(size: Size, names: tuple[str, ...], rounds: int, allocator: str) -> dict[str, Any]:
    """Measure in a process of its own, which starts with the allocator's settings."""
    given = json.dumps({"size": asdict(size), "names": names, "rounds": rounds})
    command = [sys.executable, "-m", "benchmarks.training", "--child", given]
    environment = {**os.environ, **ALLOCATORS[allocator]}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return {
        "allocator": allocator,
        **asdict(size),
        "rounds": rounds,
        "sides": summarise(json.loads(done.stdout.splitlines()[-1])),
    }


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each side that are kept.")] = 15,
    widths: Annotated[
        bool, typer.Option(help="Measure topk and batchtopk over F = 1,024 to 32,768 too, and plot it.")
    ] = True,
    small: Annotated[
        bool, typer.Option("--small", help="A tiny size and two rounds, nothing kept: does all run?")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where the JSON is kept, besides being printed.")] = (
        RESULTS / "training.json"
    ),
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time one whole training step (forward, backward, clipping, Adam, constraints) of each trainer."""
    if child is not None:
        _child(json.loads(child))
        return
    size = Size(32, 256, 128, 8) if small else Size()
    rounds = 2 if small else rounds
    before = load_average()
    cases = [run_child(size, ARCHITECTURES, rounds, allocator) for allocator in ALLOCATORS]
    if widths:
        family = ("topk", "batchtopk")
        for features in (128, 512) if small else WIDTHS:
            wide = Size(size.d, features, size.batch, size.k)
            cases.append(run_child(wide, family, max(2, min(rounds, 7)), "default"))
    results = {"machine": machine(), "load_average": [before, load_average()], "cases": cases}
    publish(results, None if small else out)
    if widths and not small:
        from .training_plot import plot

        plot(cases, out.with_suffix(".svg"))


def _child(given: dict[str, Any]) -> None:
    torch.manual_seed(0)
    with progress_bar() as progress:
        seconds = measure(Size(**given["size"]), tuple(given["names"]), given["rounds"], progress)
    print(json.dumps(seconds))


if __name__ == "__main__":
    typer.run(main)
