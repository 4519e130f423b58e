"""One SAE in training: everything that a step changes, which is everything that a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerserve.errors import ConfigError
from steerserve.sae.architectures import ARCHITECTURES, Architecture, Moment, Step
from steerserve.sae.architectures.resample import ResampledEncoder, missed_directions

from .distributed import World
from .initial import geometric_median, input_scale
from .settings import TrainSettings

__all__ = ["Progress", "Report", "Run", "advance_all", "start_runs"]

_MAX_NORM = 1.0
_REPORT_EVERY = 10
_MOMENTS = ("exp_avg", "exp_avg_sq")
_ADAM = (*_MOMENTS, "step")


@dataclass(frozen=True)
class Progress:
    """What the last step of `done` measured on its training batch.

    Attributes:
        done: steps made. loss, l0: per token. explained_variance: 1 − squared error / variance.
        dead_share: of all features, in [0, 1]. lr: the step's learning rate.
    """

    done: int
    loss: float
    l0: float
    explained_variance: float
    dead_share: float
    lr: float


class Run:
    """An SAE, its optimizer, and how long each feature has been silent.

    Args: centre: [d], of the raw input. scale: what the input is multiplied by.
    """

    def __init__(self, settings: TrainSettings, centre: Tensor, scale: float, world: World) -> None:
        self.settings, self.scale, self._world = settings, scale, world
        kind = ARCHITECTURES[settings.architecture]
        self.sae: Architecture = kind.start(settings.d_sae, centre * scale, settings.options, settings.seed)
        self.sae.precision = getattr(torch, settings.precision)
        self.sae.to(settings.place)
        self._optimizer = torch.optim.Adam(
            list(self.sae.parameters.values()), lr=settings.peak_lr, betas=settings.options.betas, fused=True
        )
        self._silent = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=settings.place)
        self.done = 0

    def advance(self, x: Tensor) -> Step:
        """One step of the optimizer.

        Args: x: [B, d], this process's part of the batch, normalised.
        Raises: ConfigError if the loss is not finite; the parameters are then as before the step.
        """
        with torch.no_grad():
            step = self._gradients(x)
            loss = float(step.loss)
            if not math.isfinite(loss):
                raise ConfigError(f"expected a finite loss, got {loss} at step {self.done}: lower `lr`")
            self.sae.before_update()
            torch.nn.utils.clip_grad_norm_(self.sae.parameters.values(), _MAX_NORM)
            self._optimizer.param_groups[0]["lr"] = self.settings.lr_at(self.done)
            self._optimizer.step()
            self.sae.after_update()
            self._silent.add_(len(x) * self._world.size).masked_fill_(step.fired, 0)
            self.done += 1
            if isinstance(self.sae, ResampledEncoder):
                self._resample(self.sae, x)
        return step

    def _resample(self, sae: ResampledEncoder, x: Tensor) -> None:
        """Where it is time, let dead features begin anew, in every process alike."""
        if not sae.options.resamples_after(self.done, self.settings.steps):
            return
        where = (self._silent >= self.settings.patience).nonzero().squeeze(1)[: len(x) // 2]
        if not 0 < len(where) < sae.d_sae:
            return
        seed = self.settings.seed * 1_000_003 + self.done
        directions = self._world.of_first(missed_directions(sae, x, len(where), seed))
        found = directions.any(dim=1)
        where, directions = where[found], directions[found]
        sae.resample(where, directions)
        for name, tensor in sae.parameters.items():
            if name != "b_dec":
                for key in _MOMENTS:
                    self._optimizer.state[tensor][key][where] = 0.0
        self._silent[where] = 0

    def _gradients(self, x: Tensor) -> Step:
        settings, world = self.settings, self._world
        seed = (settings.seed * 1_000_003 + self.done) * world.size + world.rank
        moment = Moment(self._silent >= settings.patience, settings.warmth_at(self.done), seed)
        step = self.sae.step(x, moment)
        if world.size == 1:
            return step
        numbers = torch.stack([step.loss, step.squared_error, step.l0]).float()
        world.average([p.grad for p in self.sae.parameters.values() if p.grad is not None])
        world.average([*self.sae.buffers.values(), numbers])
        loss, squared, l0 = numbers.unbind()
        return Step(loss, squared, l0, world.maximum(step.fired))

    def progress(self, step: Step, x: Tensor) -> Progress:
        """What to report of a step. Args: x: its [B, d] input."""
        variance = float((x - x.mean(0)).square().sum()) / len(x)
        explained = 1 - float(step.squared_error) / variance if variance > 0 else 0.0
        dead = float((self._silent >= self.settings.patience).float().mean())
        lr = self.settings.lr_at(self.done - 1)
        return Progress(self.done, float(step.loss), float(step.l0), explained, dead, lr)

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, as tensors by name."""
        tensors = {f"parameter.{name}": tensor for name, tensor in self.sae.parameters.items()}
        tensors |= {f"buffer.{name}": tensor for name, tensor in self.sae.buffers.items()}
        for name, tensor in self.sae.parameters.items():
            state = self._optimizer.state[tensor]
            tensors |= {f"adam.{name}.{key}": state[key] for key in _ADAM}
        numbers = torch.tensor([self.done, self.scale], dtype=torch.float64)
        return {**tensors, "numbers": numbers, "silent": self._silent}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        for name, tensor in self.sae.parameters.items():
            tensor.copy_(tensors[f"parameter.{name}"])
            self._optimizer.state[tensor] = {
                key: tensors[f"adam.{name}.{key}"].clone().to(tensor.device) for key in _ADAM
            }
        for name, tensor in self.sae.buffers.items():
            tensor.copy_(tensors[f"buffer.{name}"])
        done, self.scale = tensors["numbers"].tolist()
        self.done = int(done)
        self._silent.copy_(tensors["silent"])


Report = Callable[[int, Progress], None]


def start_runs(sample: Tensor, settings: Sequence[TrainSettings], world: World) -> list[Run]:
    """A run for each SAE, with centre and scale from a sample of the input. Args: sample: [n, d], raw."""
    centre = geometric_median(sample)
    scale = input_scale(sample, centre)
    return [Run(one, centre, scale, world) for one in settings]


def advance_all(runs: Sequence[Run], x: Tensor, steps: int, report: Report) -> None:
    """One step of every run on the same batch, reported every ten steps and after the last, `steps`.

    Args: x: as for `Run.advance`. report: called with an SAE's number and its progress.
    """
    for number, run in enumerate(runs):
        step = run.advance(x)
        if run.done % _REPORT_EVERY == 0 or run.done == steps:
            report(number, run.progress(step, x))
