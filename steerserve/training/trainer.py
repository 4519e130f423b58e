"""The training loop: one stream of batches, any number of SAEs, a checkpoint to go on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import ConfigError
from steerserve.sae.architectures import Architecture

from .distributed import World
from .prefetch import prefetched
from .run import Progress, Report, Run, advance_all, start_runs
from .settings import SHARED, TrainSettings
from .shards import ShardReader
from .state import load_state, save_state
from .stream import ShardStream

__all__ = ["Progress", "Trained", "train", "train_several"]

_CALIBRATION = 65_536

Source = ShardReader | ShardStream


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes: sae: in the units of the normalised input scale·x. scale: the input's factor.
    """

    sae: Architecture
    scale: float


def train(
    reader: Source,
    settings: TrainSettings,
    *,
    checkpoint: Path | None = None,
    report: Callable[[Progress], None] = lambda _: None,
) -> Trained:
    """Train one SAE: see `train_several`."""
    return train_several(reader, [settings], checkpoint=checkpoint, report=lambda _, p: report(p))[0]


def train_several(
    reader: Source,
    settings: Sequence[TrainSettings],
    *,
    checkpoint: Path | None = None,
    report: Report = lambda _, __: None,
    world: World | None = None,
) -> list[Trained]:
    """Train SAEs on all but the last `held_out` rows of a harvest, each on the same batches.

    Args:
        reader: the harvest, whole or still running.
        settings: how to train each; what concerns the data must be alike.
        checkpoint: a file written every `checkpoint_every` steps; where it exists, the run goes on from it
            and ends as it would have without the interruption.
        report: called with an SAE's number and its progress, every ten steps and after the last.
        world: the processes that share the work; this one alone, if not given.
    Raises: ConfigError if there are too few rows, the checkpoint is of another run, or a loss diverges.
    """
    world = world or World()
    shared, rows = settings[0], _rows(reader, settings, world)
    runs = start_runs(_sample(reader, rows, shared), settings, world)
    identity = _identity(reader, settings, rows, world)
    if checkpoint is not None and checkpoint.exists():
        _restore(runs, load_state(checkpoint, identity))
    batches = prefetched(_batches(reader, rows, shared, runs[0], world))
    for x in batches:
        advance_all(runs, x, shared.steps, report)
        done = runs[0].done
        if checkpoint is not None and world.first and done % shared.checkpoint_every == 0:
            tensors = {
                f"{i}.{name}": part for i, run in enumerate(runs) for name, part in run.state().items()
            }
            save_state(checkpoint, tensors, identity)
    return [Trained(run.sae.to(torch.device("cpu")), run.scale) for run in runs]


def _batches(reader: Source, rows: int, shared: TrainSettings, run: Run, world: World) -> Iterator[Tensor]:
    """This process's part of each batch from step `run.done` on, normalised, on the device."""
    epochs = -(-shared.steps // (rows // shared.batch_size))
    scale, first = run.scale, run.done
    batches = reader.shuffled_batches(shared.batch_size, shared.seed, epochs, rows=rows, skip=first)
    for _, batch in zip(range(first, shared.steps), batches, strict=False):
        yield world.part(batch).float().mul_(scale).to(shared.place)


def _rows(reader: Source, settings: Sequence[TrainSettings], world: World) -> int:
    """How many rows to train on, once the settings fit each other and the harvest."""
    shared = settings[0]
    for name in SHARED:
        found = {getattr(one, name) for one in settings}
        if len(found) > 1:
            raise ConfigError(f"expected one `{name}` for SAEs of one stream, got {sorted(map(str, found))}")
    if shared.batch_size % world.size:
        raise ConfigError(f"expected `batch_size` to be a multiple of {world.size} processes")
    rows = len(reader) - shared.held_out
    if rows < shared.batch_size:
        wanted = shared.batch_size + shared.held_out
        raise ConfigError(
            f"expected at least {wanted} harvested tokens (batch_size + held_out), got {len(reader)}"
        )
    return rows


def _sample(reader: Source, rows: int, shared: TrainSettings) -> Tensor:
    count = min(rows, _CALIBRATION)
    return next(reader.shuffled_batches(count, shared.seed, 1, rows=rows)).float()


def _identity(reader: Source, settings: Sequence[TrainSettings], rows: int, world: World) -> str:
    every = " ".join(one.model_dump_json() for one in settings)
    return f"{every} {reader.header.model_dump_json()} {rows} {world.size}"


def _restore(runs: Sequence[Run], tensors: dict[str, Tensor]) -> None:
    for i, run in enumerate(runs):
        prefix = f"{i}."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        run.restore(own)
