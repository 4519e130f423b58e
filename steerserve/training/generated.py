"""Training on batches that a program makes, where there is no harvest: planted data, another loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import torch
from torch import Tensor

from steerserve.errors import ConfigError

from .distributed import World
from .run import Report, advance_all, start_runs
from .settings import TrainSettings
from .trainer import Trained

__all__ = ["train_on"]

_CALIBRATION = 32_768


def train_on(
    batches: Iterable[Tensor], settings: Sequence[TrainSettings], report: Report = lambda _, __: None
) -> list[Trained]:
    """Train SAEs, each on the same batches, as `train_several` does on the batches of a harvest.

    Args:
        batches: [B, d] each, in the data's own scale. The first 32,768 rows decide centre and scale, and are
            trained on as all others are.
        settings: of each SAE. All must have the same number of steps; sizes and seeds of batches, and what
            concerns a harvest, have no meaning here.
        report: called with an SAE's number and its progress, every ten steps and after the last.
    Raises: ConfigError if there are fewer batches than steps, or a loss diverges.
    """
    steps = settings[0].steps
    if any(one.steps != steps for one in settings):
        raise ConfigError(f"expected SAEs of one stream to make {steps} steps each")
    source = iter(batches)
    first = _first(source, steps)
    runs = start_runs(torch.cat(first).float(), settings, World())
    for x in islice(chain(first, source), steps):
        advance_all(runs, x.float().mul(runs[0].scale).to(settings[0].place), steps, report)
    if runs[0].done < steps:
        raise ConfigError(f"expected {steps} batches to train on, got {runs[0].done}")
    return [Trained(run.sae.to(torch.device("cpu")), run.scale) for run in runs]


def _first(source: Iterator[Tensor], steps: int) -> list[Tensor]:
    """The batches that centre and scale are taken from."""
    first: list[Tensor] = []
    while len(first) < steps and sum(map(len, first)) < _CALIBRATION:
        batch = next(source, None)
        if batch is None:
            break
        first.append(batch)
    if not first:
        raise ConfigError(f"expected {steps} batches to train on, got none")
    return first
