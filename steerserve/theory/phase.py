"""The phase change: whether an extra feature is ignored, gets the one dimension there is, or shares it.

Two features in one dimension. Three solutions compete; their losses are known:

    ignore the extra feature (W = [1, 0]):   I_2·(p/3 − p²/4), the variance of the feature that is left out
    give it the dimension (W = [0, 1]):      I_1·(p/3 − p²/4)
    superposition (W = [1, −1], b = 0):      (I_1 + I_2)·p²/6

In superposition a sample costs only where both are present: the smaller one, whose mean square is 1/6.

Source: Elhage et al. 2022, "Superposition as a Phase Change".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .superposition import ToyModels, ToyRecipe, train_toy_models

__all__ = ["PHASES", "PhaseDiagram", "expected_phase", "solution_losses", "train_phases"]

PHASES = ("ignored", "dedicated", "superposed")
_STARTS = 3
_PRESENT = 0.5
_SHARED = 0.3


@dataclass(frozen=True)
class PhaseDiagram:
    """Attributes:
    density: [X]. importance: [Y], of the extra feature, where the other's is 1.
    found: [Y, X] indices into PHASES, of what training arrived at. expected: the same by the least loss.
    """

    density: Tensor
    importance: Tensor
    found: Tensor
    expected: Tensor

    @property
    def agreement(self) -> float:
        """The share of the diagram where training arrived at the solution of least loss."""
        return float((self.found == self.expected).float().mean())


def solution_losses(density: Tensor, importance: Tensor) -> Tensor:
    """The losses of the three solutions, in the order of PHASES; [3, ...].

    Args: density, importance: of any shapes that go together; importance is the extra feature's.
    """
    left_out = density / 3 - density.square() / 4
    both = (1 + importance) * density.square() / 6
    return torch.stack(torch.broadcast_tensors(importance * left_out, left_out, both))


def expected_phase(density: Tensor, importance: Tensor) -> Tensor:
    """Indices into PHASES of the solution with the least loss."""
    return solution_losses(density, importance).argmin(0)


def train_phases(
    density: Tensor, importance: Tensor, recipe: ToyRecipe, on_step: Callable[[], None] = lambda: None
) -> PhaseDiagram:
    """Train a model at every point of the grid, several times each, and keep the best.

    Training falls into a worse solution now and then, as in the paper; three starts make that rare.

    Args: density: [X]. importance: [Y].
    """
    p, extra = (grid.flatten().repeat(_STARTS) for grid in torch.meshgrid(density, importance, indexing="xy"))
    weights = torch.stack([torch.ones_like(extra), extra], dim=1)
    models = train_toy_models(p, weights, 1, recipe, on_step)
    losses = models.loss(models.sample(20_000 // _STARTS, torch.Generator().manual_seed(recipe.seed + 1)))
    best = losses.view(_STARTS, -1).argmin(0)
    found = _phase(models).view(_STARTS, -1).gather(0, best.unsqueeze(0)).view(len(importance), len(density))
    expected = expected_phase(density.unsqueeze(0), importance.unsqueeze(1))
    return PhaseDiagram(density, importance, found, expected)


def _phase(models: ToyModels) -> Tensor:
    """[S] indices into PHASES, by the extra feature's norm and what it shares its dimension with."""
    present, shared = models.norms[:, 1] > _PRESENT, models.interference[:, 1] > _SHARED
    return torch.where(present, torch.where(shared, 2, 1), 0)
