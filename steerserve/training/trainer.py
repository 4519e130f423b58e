"""The training loop: batches in, parameters out, and a checkpoint that a killed run goes on from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import ConfigError

from .batchtopk import Parameters, Step, sparse_step
from .initial import geometric_median, initial_parameters, input_scale
from .settings import TrainSettings
from .shards import ShardReader
from .state import load_state, save_state

__all__ = ["Progress", "Trained", "train"]

_CALIBRATION = 65_536
_THRESHOLD_RATE = 0.01
_MAX_NORM = 1.0
_REPORT_EVERY = 10


@dataclass(frozen=True)
class Trained:
    """A finished run: parameters in the units of the normalised input scale·x.

    Attributes: threshold: the inference threshold θ, in the same units. scale: the input's factor.
    """

    parameters: Parameters
    threshold: float
    scale: float


@dataclass(frozen=True)
class Progress:
    """What the last step of `done` measured on its training batch.

    Attributes: explained_variance: 1 − squared error / variance. dead_share: of all features, in [0, 1].
    """

    done: int
    loss: float
    l0: float
    explained_variance: float
    dead_share: float


@dataclass
class _Run:
    """Everything that a step changes, which is everything that a checkpoint holds."""

    parameters: Parameters
    scale: float
    optimizer: torch.optim.Adam
    silent: Tensor
    threshold: float = 0.0
    done: int = 0
    pre: Tensor = field(default_factory=lambda: torch.empty(0))


def train(
    reader: ShardReader,
    settings: TrainSettings,
    *,
    checkpoint: Path | None = None,
    report: Callable[[Progress], None] = lambda _: None,
) -> Trained:
    """Train a BatchTopK SAE on all but the last `held_out` rows of a harvest.

    Args:
        reader: the harvest. settings: how to train.
        checkpoint: a file written every `checkpoint_every` steps; where it exists, the run goes on from it
            and ends as it would have without the interruption.
        report: called every ten steps and after the last.
    Raises: ConfigError if there are too few rows, the checkpoint is of another run, or the loss diverges.
    """
    rows = len(reader) - settings.held_out
    if rows < settings.batch_size:
        wanted = settings.batch_size + settings.held_out
        raise ConfigError(
            f"expected at least {wanted} harvested tokens (batch_size + held_out), got {len(reader)}"
        )
    run = _start(reader, rows, settings)
    identity = f"{settings.model_dump_json()} {reader.header.model_dump_json()} {rows}"
    if checkpoint is not None and checkpoint.exists():
        _restore(run, checkpoint, identity)
    epochs = -(-settings.steps // (rows // settings.batch_size))
    batches = reader.shuffled_batches(settings.batch_size, settings.seed, epochs, rows=rows, skip=run.done)
    while run.done < settings.steps:
        x = next(batches).float() * run.scale
        step = _advance(run, x, settings)
        if run.done % _REPORT_EVERY == 0 or run.done == settings.steps:
            report(_progress(run, step, x, settings))
        if checkpoint is not None and run.done % settings.checkpoint_every == 0:
            _save(run, checkpoint, identity)
    return Trained(run.parameters, run.threshold, run.scale)


def _start(reader: ShardReader, rows: int, settings: TrainSettings) -> _Run:
    count = min(rows, _CALIBRATION)
    sample = next(reader.shuffled_batches(count, settings.seed, 1, rows=rows)).float()
    centre = geometric_median(sample)
    scale = input_scale(sample, centre)
    parameters = initial_parameters(settings.d_sae, centre * scale, settings.seed)
    optimizer = torch.optim.Adam(list(parameters.named().values()), lr=settings.peak_lr, fused=True)
    run = _Run(parameters, scale, optimizer, torch.zeros(settings.d_sae, dtype=torch.int64))
    # The largest buffer of a step, allocated once: fresh pages would cost as much as the product itself.
    run.pre = torch.empty(settings.batch_size, settings.d_sae)
    return run


@torch.no_grad()
def _advance(run: _Run, x: Tensor, settings: TrainSettings) -> Step:
    parameters = run.parameters
    step = sparse_step(parameters, x, settings.k, run.silent >= settings.patience, run.pre)
    if not math.isfinite(step.loss):
        raise ConfigError(f"expected a finite loss, got {step.loss} at step {run.done}: lower `lr`")
    decoder, grad = parameters.decoder, parameters.decoder.grad
    assert grad is not None
    # Rows stay on the unit sphere: what would only change their length is no descent.
    grad -= (grad * decoder).sum(-1, keepdim=True) * decoder
    torch.nn.utils.clip_grad_norm_(parameters.named().values(), _MAX_NORM)
    run.optimizer.param_groups[0]["lr"] = settings.lr_at(run.done)
    run.optimizer.step()
    decoder /= decoder.norm(dim=-1, keepdim=True)
    run.silent = torch.where(step.fired, 0, run.silent + len(x))
    # The last hundred steps, or the last tenth of a run that is still short.
    rate = max(_THRESHOLD_RATE, 10 / (run.done + 10))
    run.threshold += rate * (step.smallest - run.threshold)
    run.done += 1
    return step


def _progress(run: _Run, step: Step, x: Tensor, settings: TrainSettings) -> Progress:
    variance = float((x - x.mean(0)).square().sum()) / len(x)
    explained = 1 - step.squared_error / variance if variance > 0 else 0.0
    dead = float((run.silent >= settings.patience).float().mean())
    return Progress(run.done, step.loss, step.l0, explained, dead)


def _save(run: _Run, path: Path, identity: str) -> None:
    tensors = dict(run.parameters.named())
    for name, tensor in run.parameters.named().items():
        state = run.optimizer.state[tensor]
        tensors |= {f"adam.{name}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq", "step")}
    numbers = torch.tensor([run.done, run.threshold, run.scale], dtype=torch.float64)
    save_state(path, {**tensors, "numbers": numbers, "silent": run.silent}, identity)


def _restore(run: _Run, path: Path, identity: str) -> None:
    tensors = load_state(path, identity)
    for name, tensor in run.parameters.named().items():
        tensor.copy_(tensors[name])
        run.optimizer.state[tensor] = {
            key: tensors[f"adam.{name}.{key}"].clone() for key in ("exp_avg", "exp_avg_sq", "step")
        }
    done, run.threshold, run.scale = tensors["numbers"].tolist()
    run.done, run.silent = int(done), tensors["silent"].clone()
