"""`steerserve train`: shards in, an SAE that the server loads out."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from steerserve.errors import ConfigError

from .evaluate import Evaluation
from .save import save_trained
from .settings import TrainSettings, parse_settings
from .shards import ShardReader
from .trainer import Progress
from .trainer import train as run

__all__ = ["train", "train_folder"]

_EVALUATION_BATCH = 4096


def train_folder(
    shards: Path, out: Path, settings: TrainSettings, console: Console | None = None
) -> Evaluation:
    """Train on a harvest and leave the SAE in `out`, which appears only when it is whole.

    A run that was killed goes on from its checkpoint beside `out` when it is started again.

    Raises: ConfigError if `out` exists or a setting does not fit the harvest; CheckpointError if a shard is
        damaged.
    """
    if out.exists():
        raise ConfigError(f"expected a new folder to write, {out} exists")
    reader = ShardReader(shards)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_name(f"{out.name}.checkpoint.safetensors")
    with _bar(console or Console()) as bar:
        task = bar.add_task("train", total=settings.steps, detail="")
        trained = run(
            reader,
            settings,
            checkpoint=checkpoint,
            report=lambda p: bar.update(task, completed=p.done, detail=_detail(bar, p, settings)),
        )
    staging = out.with_name(f".{out.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    first = len(reader) - settings.held_out
    spans = range(first, len(reader), _EVALUATION_BATCH)
    held_out = (reader.activations(start, min(start + _EVALUATION_BATCH, len(reader))) for start in spans)
    found = save_trained(staging, trained, settings, reader.header, held_out)
    staging.rename(out)
    checkpoint.unlink(missing_ok=True)
    return found


def train(shards: Path, out: Path, **values: Any) -> None:
    """Train a BatchTopK SAE on the activation shards of `steerserve harvest`.

    Writes SAELens' layout with our manifest to OUT. Started again after a kill, it goes on where it was.
    """
    console = Console()
    found = train_folder(shards, out, parse_settings(values), console)
    console.print(
        f"{out}: explained variance {found.explained_variance:.3f}, R² {found.r2:.3f}, L0 {found.l0:.1f}, "
        f"dead {found.dead_fraction:.1%} on {found.tokens:,} held-out tokens"
    )


def _with_settings() -> tuple[inspect.Signature, dict[str, Any]]:
    """The command's signature: every setting becomes an option, with its description as the help."""
    given: list[tuple[str, Any, Any]] = [
        ("shards", Path, typer.Argument(help="Folder of activation shards.")),
        ("out", Path, typer.Argument(help="New folder for the SAE.")),
    ]
    for name, info in TrainSettings.model_fields.items():
        given.append((name, info.annotation, typer.Option(info.default, help=info.description)))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, default=d, annotation=hint) for name, hint, d in given]
    return inspect.Signature(parameters), {item.name: item.annotation for item in parameters}


def _bar(console: Console) -> Bar:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[detail]}"), TimeRemainingColumn())
    return Bar(*columns, console=console)


def _detail(bar: Bar, p: Progress, settings: TrainSettings) -> str:
    speed = bar.tasks[0].speed or 0.0
    return (
        f"loss {p.loss:.4f}  L0 {p.l0:.1f}  EV {p.explained_variance:.3f}  dead {p.dead_share:.1%}  "
        f"{speed * settings.batch_size:,.0f} tokens/s"
    )


# Typer reads a command's options from its signature; this one is generated, so that help is written once.
_SIGNATURE, train.__annotations__ = _with_settings()
train.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
