"""`steerserve toy` and `steerserve scaling`: theory of sparse autoencoders, tried out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from steerserve.errors import ConfigError
from steerserve.experiments.style import ready_folder
from steerserve.sae.architectures import ARCHITECTURES

__all__ = ["progress_bar", "scaling", "toy"]

Out = Annotated[Path, typer.Option("--out", help="Folder for JSON and plots; made if it is not there.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Decides data, starts and batches.")]


def toy(
    out: Out,
    steps: Annotated[int, typer.Option(min=10, help="Optimizer steps of each SAE.")] = 3000,
    toy_steps: Annotated[int, typer.Option(min=10, help="Optimizer steps of the toy models.")] = 1500,
    architecture: Annotated[
        list[str] | None,
        typer.Option(help="An SAE to look for the planted dictionary with; all of one layer if not given."),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Toy models of superposition, and how well each architecture recovers a planted dictionary.

    Writes superposition.json and .png (features against density, interference, the phase change), and
    recovery.json and .png (256 features in 128 dimensions).
    """
    from . import recovery_plot, superposition_plot
    from .densities import SuperpositionSetup, study_superposition
    from .recovery import RecoverySetup, recover

    folder, started = ready_folder(out), time.perf_counter()
    names = _known(architecture)
    with progress_bar() as bar:
        study = study_superposition(
            SuperpositionSetup(steps=toy_steps, seed=seed), _counter(bar, "toy models", 3 * toy_steps)
        )
        superposition_plot.draw(study, folder / "superposition.png")
        _write(folder / "superposition.json", {"steps": toy_steps, "seed": seed, **study.numbers()})
        setup, found = RecoverySetup(steps=steps, seed=seed), []
        for name in names:
            task = bar.add_task(name, total=steps, detail="")
            found.append(
                recover(
                    name,
                    setup,
                    lambda p, task=task: bar.update(  # type: ignore[misc]
                        task, completed=p.done, detail=f"loss {p.loss:.4f}, L0 {p.l0:.1f}"
                    ),
                )
            )
    recovery_plot.draw(found, folder / "recovery.png")
    rows = [run.numbers() for run in found]
    _write(folder / "recovery.json", {**vars(setup), "runs": rows})
    _print(rows)
    print(f"{folder}: superposition and recovery, JSON and PNG, {time.perf_counter() - started:.0f} s")


def scaling(
    out: Out,
    shards: Annotated[
        Path | None,
        typer.Argument(help="Folder of activation shards; planted data with rare features, if not given."),
    ] = None,
    architecture: Annotated[str, typer.Option(help="What to train; one with a k.")] = "topk",
    width: Annotated[
        list[int] | None, typer.Option(min=1, help="Features of an SAE. Given several times.")
    ] = None,
    k: Annotated[
        list[int] | None, typer.Option("--k", min=1, help="Active features. Given several times.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens to train on. Given several times.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Tokens per step.")] = 512,
    budget: Annotated[
        float, typer.Option(min=1.0, help="What the next run may cost, in units of the dearest run so far.")
    ] = 4.0,
    seed: Seed = 0,
) -> None:
    """Train a sweep of SAEs, fit how the loss falls with L0, width and tokens, and say which run to do next.

    Writes scaling.json and scaling.png.
    """
    from . import scaling_plot
    from .law import fit_law
    from .next_run import propose
    from .sweep import Sweep, run_sweep

    folder, started = ready_folder(out), time.perf_counter()
    given = {"widths": width, "ks": k, "tokens": tokens}
    sets = {name: tuple(sorted(set(values))) for name, values in given.items() if values}
    sweep = Sweep(architecture=architecture, batch=batch_size, seed=seed, **sets)  # type: ignore[arg-type]
    with progress_bar() as bar:
        runs, d_in = run_sweep(sweep, shards, _counter(bar, "sweep", sweep.steps // 10))
    points = [run.point for run in runs]
    law = fit_law(points)
    proposals = propose(law, points, d_in, budget)
    scaling_plot.draw(points, law, proposals, d_in, folder / "scaling.png")
    rows = [run.numbers() for run in runs]
    following = [vars(one) for one in proposals]
    _write(folder / "scaling.json", {"runs": rows, "law": law.numbers(), "next": following})
    _print(following)
    print(
        f"{folder}: {len(runs)} runs, the law is {law.error:.1%} off (root mean square); above, what to "
        f"train next at each L0; {time.perf_counter() - started:.0f} s"
    )


def progress_bar() -> Progress:
    """A line for each stage, on stderr."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[detail]}"), console=Console(stderr=True))


def _counter(bar: Progress, name: str, total: int) -> Callable[[str], None]:
    task = bar.add_task(name, total=total, detail="")
    return lambda detail: bar.update(task, advance=1, detail=detail)


def _known(names: Sequence[str] | None) -> list[str]:
    """Raises: ConfigError for a name that is no architecture of one linear layer."""
    from .recovery import RECOVERED

    for name in names or []:
        if name not in ARCHITECTURES:
            raise ConfigError(f"expected --architecture to be one of {', '.join(ARCHITECTURES)}, got {name}")
    return list(names or RECOVERED)


def _write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _print(rows: Sequence[dict[str, Any]]) -> None:
    shown = Table(*rows[0], box=None)
    for row in rows:
        shown.add_row(*(_cell(value) for value in row.values()))
    Console().print(shown)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.3g}"
