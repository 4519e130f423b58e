"""`steerserve train`: shards in, SAEs that the server loads out."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from steerserve.errors import ConfigError
from steerserve.sae.architectures import ARCHITECTURES

from .config import TrainConfig, read_config
from .distributed import World, join_world
from .evaluate import Evaluation
from .log import LOG, TrainingLog, lines_of
from .save import save_trained
from .settings import TrainSettings
from .shards import ShardReader
from .state import done_steps
from .trainer import Progress, Trained, train_several

__all__ = ["train", "train_folder", "train_folders"]

_EVALUATION_BATCH = 4096


def train_folder(
    shards: Path, out: Path, settings: TrainSettings, console: Console | None = None
) -> Evaluation:
    """Train one SAE: see `train_folders`."""
    return train_folders(TrainConfig(shards, {out: settings}), console)[0]


def train_folders(
    config: TrainConfig, console: Console | None = None, world: World | None = None
) -> list[Evaluation]:
    """Train SAEs on one harvest and leave each in its folder, which appears only when it is whole.

    A run that was killed goes on from its checkpoint, beside the first folder, when it is started again.

    Returns: what was found of each on held-out tokens; nothing in the processes that do not write.
    Raises: ConfigError if a folder exists or a setting does not fit the harvest; CheckpointError if a shard
        is damaged.
    """
    world = world or World()
    for out in config.saes:
        if out.exists():
            raise ConfigError(f"expected a new folder to write, {out} exists")
    reader = ShardReader(config.shards)
    first = next(iter(config.saes))
    first.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = first.with_name(f"{first.name}.checkpoint.safetensors")
    log = first.with_name(f"{first.name}.{LOG}")
    trained = _train(reader, config, checkpoint, log, console or Console(stderr=True), world)
    if not world.first:
        return []
    pairs = zip(config.saes.items(), trained, strict=True)
    found = [_stage(out, one, settings, reader, log) for (out, settings), one in pairs]
    # None appears before all are whole: the same command, given again after a kill, then still finds its run.
    for out in config.saes:
        _staging(out).rename(out)
    checkpoint.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    return found


def train(source: Path, out: Path | None = None, **values: Any) -> None:
    """Train SAEs on the activation shards of `steerserve harvest`.

    SOURCE is a YAML file of settings, or the folder of shards itself. Each SAE is written in SAELens' layout
    with our manifest. Started again after a kill, the run goes on where it was. Under `torchrun`, all
    processes train the same SAEs, each on its part of every batch.
    """
    console = Console(stderr=True)
    given = {name: value for name, value in values.items() if value not in (None, [])}
    config = read_config(source, {**given, **({"out": out} if out else {})})
    with join_world() as world:
        evaluations = train_folders(config, console, world)
    for folder, found in zip(config.saes, evaluations, strict=False):
        print(
            f"{folder}: explained variance {found.explained_variance:.3f}, R² {found.r2:.3f}, "
            f"L0 {found.l0:.1f}, dead {found.dead_fraction:.1%} on {found.tokens:,} held-out tokens"
        )


def _train(
    reader: ShardReader, config: TrainConfig, checkpoint: Path, log: Path, console: Console, world: World
) -> Sequence[Trained]:
    settings = config.settings
    if not world.first:
        return train_several(reader, settings, checkpoint=checkpoint, world=world)
    start, names = done_steps(checkpoint), [out.name for out in config.saes]
    with (
        _bar(console) as bar,
        TrainingLog(log, names, start, settings[0].batch_size, config.tensorboard) as lines,
    ):
        tasks = [
            bar.add_task(name, total=one.steps, detail="") for name, one in zip(names, settings, strict=True)
        ]

        def report(number: int, progress: Progress) -> None:
            lines.write(number, progress)
            detail = _detail(progress, lines.tokens_per_second)
            bar.update(tasks[number], completed=progress.done, detail=detail)

        return train_several(reader, settings, checkpoint=checkpoint, report=report, world=world)


def _stage(
    out: Path, trained: Trained, settings: TrainSettings, reader: ShardReader, log: Path
) -> Evaluation:
    staging = _staging(out)
    shutil.rmtree(staging, ignore_errors=True)
    first = len(reader) - settings.held_out
    spans = range(first, len(reader), _EVALUATION_BATCH)
    held_out = (reader.activations(start, min(start + _EVALUATION_BATCH, len(reader))) for start in spans)
    found = save_trained(staging, trained, settings, reader.header, held_out)
    (staging / LOG).write_text(lines_of(log, out.name), encoding="utf-8")
    return found


def _staging(out: Path) -> Path:
    return out.with_name(f".{out.name}.part")


def _with_settings() -> tuple[inspect.Signature, dict[str, Any]]:
    """The command's signature: every setting becomes an option, with its description as the help."""
    help_ = "A YAML file of settings, or a folder of activation shards."
    given: list[tuple[str, Any, Any]] = [
        ("source", Path, typer.Argument(help=help_)),
        ("out", Path | None, typer.Argument(None, help="New folder for the SAE, or for one folder each.")),
        ("shards", Path | None, typer.Option(None, help="Folder of activation shards.")),
        ("tensorboard", Path | None, typer.Option(None, help="Folder for TensorBoard's events.")),
    ]
    fields = {name: [info] for name, info in TrainSettings.model_fields.items() if name != "options"}
    for kind in ARCHITECTURES.values():
        for name, info in kind.Options.model_fields.items():
            fields.setdefault(name, []).append(info)
    for name, infos in fields.items():
        # Architectures may mean their own by one name; each sentence is said once.
        help_ = " ".join(dict.fromkeys(map(_sentence, infos)))
        given.append((name, _plain(infos[0].annotation) | None, typer.Option(None, help=help_)))
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kinds, default=d, annotation=hint) for name, hint, d in given]
    return inspect.Signature(parameters), {item.name: item.annotation for item in parameters}


def _sentence(info: FieldInfo) -> str:
    default = info.default
    unset = default is None or default is PydanticUndefined
    return f"{info.description}" if unset else f"{info.description} [default: {default}]"


def _plain(annotation: Any) -> Any:
    """The type that the command line parses: of `int | None` int, of a literal str."""
    options = [part for part in getattr(annotation, "__args__", ()) if part is not type(None)]
    if annotation in (int, float, str, bool) or getattr(annotation, "__origin__", None) is list:
        return annotation
    return str if all(isinstance(part, str) for part in options) else options[0]


def _bar(console: Console) -> Bar:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    return Bar(*columns, console=console)


def _detail(p: Progress, speed: float) -> str:
    return (
        f"loss {p.loss:.4f}  L0 {p.l0:.1f}  EV {p.explained_variance:.3f}  dead {p.dead_share:.1%}  "
        f"{speed:,.0f} tokens/s"
    )


# Typer reads a command's options from its signature; this one is generated, so that help is written once.
_SIGNATURE, train.__annotations__ = _with_settings()
train.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
