"""What steering adds to one step on the host, without vLLM: microseconds of each part, as JSON.

python -m benchmarks.step && python -m benchmarks.table
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Annotated

import numpy as np
import torch
import typer

from steerserve.catalog import Catalog, build_catalog
from steerserve.compile import compile_plan
from steerserve.config import SaeConfig, SteerserveConfig
from steerserve.runtime.host import HostRuntime
from steerserve.spec import parse_spec

from .command import RESULTS, publish
from .machine import load_average, machine
from .shapes import write_sae

__all__ = ["Case", "main", "time_case"]

VOCAB = 2048
FEATURES = 1024
LAYER = 1
PROMPT = 64
PREFILL = 512
WARM_UP = 10
PARTS = ("begin", "steer", "end", "settle")


@dataclass(frozen=True)
class Case:
    """A step: `requests` requests of `tokens` tokens in all, each with a plan of its own of `rows` rows."""

    phase: str
    requests: int
    tokens: int
    rows: int
    d_model: int


def cases(width: int) -> Iterator[Case]:
    """Decode steps of several batches, and one prompt's prefill, over numbers of rows."""
    for rows in (1, 8, 16):
        yield from (Case("decode", requests, requests, rows, width) for requests in (1, 32, 256))
        yield Case("prefill", 1, PREFILL, rows, width)


def time_case(case: Case, catalog: Catalog, repeats: int) -> dict[str, float]:
    """Median microseconds of each part of a step, and of the whole: `step`."""
    runtime = HostRuntime(
        catalog,
        [point.index for point in catalog.points],
        max_requests=case.requests,
        max_tokens=max(case.tokens, PREFILL),
        vocab=VOCAB,
    )
    names = [f"request-{i}" for i in range(case.requests)]
    for i, name in enumerate(names):
        _add(runtime, catalog, name, i, case.rows)
    scheduled = np.full(case.requests, case.tokens // case.requests, dtype=np.int32)
    token_ids = np.full(case.tokens, 7, dtype=np.int32)
    fresh, addend = (torch.randn(case.tokens, case.d_model).to(torch.bfloat16) for _ in range(2))
    stream = fresh.clone()
    point = next(iter(runtime.buffers))
    spent: list[list[int]] = []
    for step in range(WARM_UP + repeats):
        computed = np.full(case.requests, step * scheduled[0], dtype=np.int32)
        after = dict(zip(names, (computed + scheduled).tolist(), strict=True))
        stream.copy_(fresh)
        parts: tuple[Callable[[], None], ...] = (
            partial(runtime.begin_step, names, scheduled, computed, token_ids),
            partial(runtime.steer, point, stream, addend),
            runtime.end_step,
            partial(runtime.settle, after),
        )
        spent.append([_nanoseconds(part) for part in parts])
    kept = spent[WARM_UP:]
    found = {name: median(column) / 1e3 for name, column in zip(PARTS, zip(*kept, strict=True), strict=True)}
    return {**found, "step": median(sum(times) for times in kept) / 1e3}


def _nanoseconds(part: Callable[[], None]) -> int:
    started = perf_counter_ns()
    part()
    return perf_counter_ns() - started


def _add(runtime: HostRuntime, catalog: Catalog, name: str, number: int, rows: int) -> None:
    """A request whose plan no other request has."""
    features = [(number * rows + i) % FEATURES for i in range(rows)]
    interventions = [
        {"feature": feature, "op": "clamp", "value": 1.0 + number * 1e-3, "where": {"special_tokens": True}}
        for feature in features
    ]
    plan = compile_plan(parse_spec({"interventions": interventions}), catalog)
    runtime.add(name, plan.wire, np.full(PROMPT, 7, dtype=np.int64), "", 0)


def main(
    repeats: Annotated[int, typer.Option(min=10, help="Steps measured of each case.")] = 300,
    width: Annotated[
        list[int] | None, typer.Option(help="Width of the residual stream. May be given several times.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the JSON is kept, besides being printed.")] = (
        RESULTS / "step.json"
    ),
) -> None:
    """Time `HostRuntime.begin_step`, `steer`, `end_step` and `settle` on random weights, with one thread."""
    torch.set_num_threads(1)
    found = []
    before = load_average()
    for d_model in width or (256, 896, 4096):
        with tempfile.TemporaryDirectory(prefix="steerserve-step-") as folder:
            sae = SaeConfig(name="bench", path=write_sae(Path(folder) / "sae", d_model, FEATURES, LAYER))
            catalog = build_catalog(SteerserveConfig(saes=[sae]), n_layers=4, d_model=d_model)
            for case in cases(d_model):
                spent = time_case(case, catalog, repeats)
                found.append(
                    {**asdict(case), "microseconds": {name: round(us, 2) for name, us in spent.items()}}
                )
    results = {
        "machine": machine(),
        "load_average": [before, load_average()],
        "repeats": repeats,
        "cases": found,
    }
    publish(results, out)


if __name__ == "__main__":
    typer.run(main)
