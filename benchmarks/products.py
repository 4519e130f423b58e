"""Milliseconds of a training step's dense products: by torch's BLAS and as the trainer makes them, as JSON.

python -m benchmarks.products && python -m benchmarks.table
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from steerserve.sae.architectures.products import linear, mixed, weighed

from .command import RESULTS, progress_bar, publish
from .machine import load_average, machine
from .rounds import order
from .summary import Spread
from .trainers import Size

__all__ = ["main", "products"]

WIDTHS = (256, 1024, 4096, 16_384)
WARM_UP = 2


def products(size: Size) -> dict[str, dict[str, Callable[[], Any]]]:
    """Each of the three products of a dense step, both ways; all write into memory that is there.

    Returns: product → "blas" and "ours" → what computes it once.
    """
    x, toward = torch.randn(size.batch, size.d), torch.randn(size.batch, size.d)
    encoder, bias = torch.randn(size.features, size.d), torch.randn(size.features)
    out, f = torch.empty(size.batch, size.features), torch.randn(size.batch, size.features)
    decoded, grad = torch.empty(size.batch, size.d), torch.empty(size.features, size.d)
    return {
        "encode": {
            "blas": lambda: torch.addmm(bias, x, encoder.T, out=out),
            "ours": lambda: linear(x, encoder, bias).into(out),
        },
        "decode": {
            "blas": lambda: torch.mm(f, encoder, out=decoded),
            "ours": lambda: decoded.copy_(mixed(f, encoder)),
        },
        "gradient of the decoder": {
            "blas": lambda: torch.mm(f.T, toward, out=grad),
            "ours": lambda: weighed(f, toward, grad),
        },
    }


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side that are kept.")] = 15,
    small: Annotated[
        bool, typer.Option("--small", help="A tiny size and two rounds, nothing kept: does all run?")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where the JSON is kept, besides being printed.")] = (
        RESULTS / "products.json"
    ),
) -> None:
    """Time the products of B × F × d numbers that a dense training step makes."""
    before, rounds = load_average(), 2 if small else rounds
    sizes = [Size(32, 64, 128)] if small else [Size(features=features) for features in WIDTHS]
    with progress_bar() as bar:
        cases = [_case(size, rounds, bar) for size in sizes]
    results = {
        "machine": machine(),
        "load_average": [before, load_average()],
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "cases": cases,
    }
    publish(results, None if small else out)


def _case(size: Size, rounds: int, bar: Progress) -> dict[str, Any]:
    """Every product of one size: milliseconds both ways, and how often as fast ours was in the same round."""
    sides = {(name, by): once for name, both in products(size).items() for by, once in both.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in sides}
    task = bar.add_task(f"F = {size.features}", total=(rounds + WARM_UP) * len(sides), detail="")
    for number in range(-WARM_UP, rounds):
        for key in order(list(sides), max(number, 0)):
            bar.update(task, advance=1, detail=key[0])
            began = perf_counter()
            sides[key]()
            if number >= 0:
                seconds[key].append(perf_counter() - began)
    return {**asdict(size), "products": {name: _figures(seconds, name, size) for name, _ in sides}}


def _figures(seconds: Mapping[tuple[str, str], Sequence[float]], name: str, size: Size) -> dict[str, Any]:
    blas, own = seconds[name, "blas"], seconds[name, "ours"]
    operations = 2 * size.batch * size.features * size.d
    return {
        "blas_ms": asdict(Spread.of([s * 1e3 for s in blas])),
        "ours_ms": asdict(Spread.of([s * 1e3 for s in own])),
        "ratio": asdict(Spread.of([a / b for a, b in zip(blas, own, strict=True)])),
        "ours_gflops": operations / Spread.of(own).median / 1e9,
    }


if __name__ == "__main__":
    typer.run(main)
