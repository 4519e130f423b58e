"""Training of the experiments: Adam by autograd on a data set that fits into memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

__all__ = ["Recipe", "Trainable", "fit", "progress_bar"]


class Trainable(Protocol):
    """A module with a loss of its own."""

    def parameters(self) -> object:
        """What is trained."""

    def loss(self, x: Tensor) -> Tensor:
        """The scalar to make small on a batch."""


@dataclass(frozen=True)
class Recipe:
    """Adam's settings.

    Attributes:
        steps: optimizer steps. batch: samples per step, drawn anew from the data each time.
        lr: learning rate, lowered linearly to 0 over the last fifth. seed: decides the batches.
    """

    steps: int
    batch: int
    lr: float
    seed: int


def fit(
    model: Trainable, x: Tensor, recipe: Recipe, *, name: str = "train", bar: Progress | None = None
) -> list[float]:
    """Train `model` in place on samples x: [n, ...].

    Returns: the loss at every step. The same model, data and recipe give the same result on one machine.
    """
    assert isinstance(model, nn.Module)
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    task = bar.add_task(name, total=recipe.steps, loss="") if bar else None
    losses = []
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.lr * min(1.0, (recipe.steps - step) / (0.2 * recipe.steps))
        loss = model.loss(x[torch.randint(len(x), (recipe.batch,), generator=generator)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if bar and task is not None:
            bar.update(task, completed=step + 1, loss=f"loss {losses[-1]:.4f}")
    return losses


def progress_bar() -> Progress:
    """A line for each SAE in training, on stderr."""
    name, loss = TextColumn("{task.description:<34}"), TextColumn("{task.fields[loss]}")
    columns = (name, BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
