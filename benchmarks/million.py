"""What the size of an SAE costs: one of a million features against one of 2,048, as JSON.

python -m benchmarks.million --out benchmarks/results/million.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from .machine import load_average, machine
from .sparse import WEIGHTS, write_sparse_sae

__all__ = ["main"]

SMALL = 2048
NAMED = 64


def main(
    features: Annotated[int, typer.Option(min=2 * NAMED, help="Features of the large SAE.")] = 1_048_576,
    width: Annotated[int, typer.Option(min=8, help="Width of the residual stream.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes for each start-up measurement.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="Write the SAEs below this folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here as well.")] = None,
) -> None:
    """Time opening two sparse SAEs, and the first use of 64 features of each, in fresh processes in turns."""
    before = load_average()
    with tempfile.TemporaryDirectory(prefix="million_", dir=folder) as temporary:
        tasks = [_written(Path(temporary), d_sae, width) for d_sae in (SMALL, features)]
        files = [(Path(task["folder"]) / WEIGHTS).stat() for task in tasks]
        opened = _in_turns(tasks, "open", rounds)
        catalogs = _in_turns(tasks, "catalog", rounds)
        named = [_run(task, "features") for task in tasks]
    sizes = [
        {
            "d_sae": task["d_sae"],
            "file_gib": round(file.st_size / 2**30, 3),
            "disk_gib": round(file.st_blocks * 512 / 2**30, 3),
            "open_sae_ms": _spread([run["ms"] for run in opened[i]]),
            "build_catalog_ms": _spread([run["ms"] for run in catalogs[i]]),
            "process_s": _spread([run["process_s"] for run in catalogs[i]]),
            "growth_mib": {
                "opened": _rounded(named[i]["growth_mib"]["opened"]),
                f"named_{NAMED}": _rounded(named[i]["growth_mib"]["named"]),
            },
            "first_use_ms": {
                state: {clock: _spread(values) for clock, values in named[i][state].items()}
                for state in ("cold", "hole", "warm")
            },
        }
        for i, (task, file) in enumerate(zip(tasks, files, strict=True))
    ]
    results = {
        "machine": machine(),
        "load_average": [before, load_average()],
        "width": width,
        "sizes": sizes,
        "start_up_ratio": round(sizes[1]["process_s"]["median"] / sizes[0]["process_s"]["median"], 3),
    }
    text = json.dumps(results, indent=1) + "\n"
    print(text, end="")
    if out is not None:
        out.write_text(text, encoding="utf-8")


def _written(folder: Path, d_sae: int, d_in: int) -> dict[str, Any]:
    """An SAE on disk, with the features that are named in it: written ones, and others between them."""
    step = d_sae // NAMED
    written = [i * step for i in range(NAMED)]
    path = write_sparse_sae(folder / str(d_sae), d_sae, d_in, written)
    holes = [feature + step // 2 for feature in written]
    return {"folder": str(path), "d_sae": d_sae, "d_in": d_in, "written": written, "holes": holes}


def _in_turns(tasks: Sequence[dict[str, Any]], name: str, rounds: int) -> list[list[dict[str, Any]]]:
    runs = [[_run(task, name) for task in tasks] for _ in range(rounds)]
    return [list(column) for column in zip(*runs, strict=True)]


def _run(task: dict[str, Any], name: str) -> dict[str, Any]:
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.opening", json.dumps({**task, "task": name})],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(found.stdout)
    return result


def _spread(values: Sequence[float]) -> dict[str, float]:
    return _rounded({"median": median(values), "min": min(values), "max": max(values)})


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


if __name__ == "__main__":
    typer.run(main)
