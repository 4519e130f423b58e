"""`steerserve experiment`: the two experimental architectures on planted data, as JSON and a plot."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from .fit import progress_bar
from .style import ready_folder

__all__ = ["app", "rows"]

app = typer.Typer(
    help="Try the experimental architectures on data with planted structure.", no_args_is_help=True
)

_OMITTED = ("losses", "matches", "best")
Out = Annotated[
    Path, typer.Option("--out", help="Folder for the JSON and the plot; made if it is not there.")
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps of each SAE.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Decides the data, the starts and the batches.")]


@app.command()
def tensor(out: Out, steps: Steps = 1000, seed: Seed = 0) -> None:
    """Rank-1 atoms over (colour, height, width) against flat ones, on images of bars and of diagonals."""
    from .tensor import run
    from .tensor_plot import draw

    folder = ready_folder(out)
    started = time.perf_counter()
    with progress_bar() as bar:
        result = run(steps, seed, bar)
    draw(result, folder / "tensor.png")
    _write(folder / "tensor.json", "tensor", steps, seed, rows(result.runs), started)


@app.command()
def functional(out: Out, steps: Steps = 1000, seed: Seed = 0) -> None:
    """Activation functions in Fourier space against flat SAEs, on functions over 1-D and 2-D grids."""
    from .functional import run
    from .functional_plot import draw

    folder = ready_folder(out)
    started = time.perf_counter()
    with progress_bar() as bar:
        result = run(steps, seed, bar)
    draw(result, folder / "functional.png")
    _write(folder / "functional.json", "functional", steps, seed, rows(result.runs), started)


def rows(runs: Sequence[Any]) -> list[dict[str, Any]]:
    """One plain mapping a run: its numbers and its last loss, without tensors and curves."""
    table = []
    for run in runs:
        row = {field.name: getattr(run, field.name) for field in fields(run) if field.name not in _OMITTED}
        table.append({**row, "final_loss": run.losses[-1] if run.losses else None})
    return table


def _write(path: Path, name: str, steps: int, seed: int, table: list[dict[str, Any]], started: float) -> None:
    seconds = round(time.perf_counter() - started, 1)
    report = {"experiment": name, "steps": steps, "seed": seed, "seconds": seconds, "runs": table}
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(*map(_line, table), sep="\n")
    print(f"{path} and {path.with_suffix('.png')}, {seconds} s")


def _line(row: dict[str, Any]) -> str:
    """A run in words; of explained variances by grid, the training grid's."""
    explained = row["explained_variance"]
    explained = next(iter(explained.values())) if isinstance(explained, dict) else explained
    images = f", {row['images']} images" if "images" in row else ""
    cosine = "" if row["mmcs"] is None else f", mean max cosine {row['mmcs']:.3f}"
    return (
        f"{row['data'] + images:<22} {row['model']:<22} explained variance {explained:.3f}, "
        f"L0 {row['l0']:.1f} of {row['latents']}{cosine}, {row['parameters']:,} parameters"
    )
