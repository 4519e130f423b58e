"""A sweep over widths, active features and tokens, on a harvest's shards or on planted data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerserve.errors import ConfigError
from steerserve.sae.architectures import ARCHITECTURES
from steerserve.training.evaluate import evaluate
from steerserve.training.generated import train_on
from steerserve.training.run import Progress
from steerserve.training.settings import TrainSettings, parse_settings
from steerserve.training.shards import ShardReader
from steerserve.training.trainer import Trained, train_several

from .law import Point
from .planted import PlantedData, zipf

__all__ = ["Sweep", "SweepRun", "planted_world", "run_sweep"]

_HELD_OUT = 8192
_HELD_OUT_SEED = 1_000_003
_CHUNK = 2048


@dataclass(frozen=True)
class Sweep:
    """What is trained: every width with every k and every number of tokens.

    Attributes:
        architecture: one with the option `k`. lr: of all runs; the trainer's law of widths if None.
        seed: decides starts and data.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    ks: tuple[int, ...] = (4, 8, 16)
    tokens: tuple[int, ...] = (65_536, 196_608, 524_288)
    architecture: str = "topk"
    batch: int = 512
    lr: float | None = None
    seed: int = 0
    grid: tuple[tuple[int, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        if "k" not in ARCHITECTURES[self.architecture].Options.model_fields:
            raise ConfigError(f"expected an architecture with a `k`, got {self.architecture}")
        pairs = tuple((n, k) for n, k in product(self.widths, self.ks) if k <= n)
        object.__setattr__(self, "grid", pairs)

    @property
    def steps(self) -> int:
        """Optimizer steps of all runs together."""
        return len(self.grid) * sum(tokens // self.batch for tokens in self.tokens)


@dataclass(frozen=True)
class SweepRun:
    """One trained SAE. Attributes: point: what was set, and its loss: the share of the variance that is
    left on held-out samples. l0, dead_fraction: measured on those."""

    point: Point
    l0: float
    dead_fraction: float

    def numbers(self) -> dict[str, Any]:
        """What goes into the JSON."""
        return {**vars(self.point), "l0": self.l0, "dead_fraction": self.dead_fraction}


def planted_world(d_in: int = 64, features: int = 1024, l0: float = 16.0, seed: int = 0) -> PlantedData:
    """Planted data with rare features without end in sight: densities fall as 1/rank."""
    return PlantedData.random(zipf(features, l0), d_in, seed)


def run_sweep(
    sweep: Sweep, shards: Path | None = None, on_step: Callable[[str], None] = lambda _: None
) -> tuple[list[SweepRun], int]:
    """Train all SAEs. Those of one number of tokens see the same batches, side by side.

    Args: shards: of a harvest; planted data if None. on_step: called now and then with what is trained.
    Returns: the runs, and the width of the data.
    """
    reader = None if shards is None else ShardReader(shards)
    world = planted_world(seed=sweep.seed)
    found = []
    for tokens in sweep.tokens:
        settings = [_settings(sweep, n, k, tokens) for n, k in sweep.grid]

        def report(number: int, progress: Progress, tokens: int = tokens) -> None:
            if progress.done % 10 == 0:
                n, k = sweep.grid[number]
                on_step(f"{tokens:,} tokens: F {n}, k {k}, loss {progress.loss:.3f}")

        if reader is None:
            trained = train_on(world.batches(sweep.batch, sweep.seed), settings, report)
            held_out = list(world.sample(_HELD_OUT, _generator())[0].split(_CHUNK))
        else:
            trained = train_several(reader, settings, report=report)
            held_out = list(_last_rows(reader, settings[0].held_out))
        found += [
            _measured(one, Point(k, n, tokens), held_out)
            for one, (n, k) in zip(trained, sweep.grid, strict=True)
        ]
    return found, held_out[0].shape[1]


def _settings(sweep: Sweep, width: int, k: int, tokens: int) -> TrainSettings:
    values: dict[str, Any] = {
        "architecture": sweep.architecture,
        "batch_size": sweep.batch,
        "d_sae": width,
        # Rare features are rarer than the default allows in runs as short as these.
        "dead_after": max(4 * sweep.batch, tokens // 8),
        "held_out": _HELD_OUT,
        "k": k,
        "lr": sweep.lr,
        "seed": sweep.seed,
        "tokens": tokens,
    }
    return parse_settings(values)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_HELD_OUT_SEED)


def _last_rows(reader: ShardReader, count: int) -> Iterator[Tensor]:
    for start in range(len(reader) - count, len(reader), _CHUNK):
        yield reader.activations(start, min(start + _CHUNK, len(reader))).float()


def _measured(trained: Trained, point: Point, held_out: list[Tensor]) -> SweepRun:
    with torch.no_grad():
        found = evaluate(trained.sae, (x * trained.scale for x in held_out))
    loss = 1 - found.explained_variance
    return SweepRun(Point(point.k, point.width, point.tokens, loss), found.l0, found.dead_fraction)
