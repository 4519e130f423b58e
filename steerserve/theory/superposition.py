"""The toy model of superposition: more features than dimensions, and a ReLU that filters the interference.

    h = Wᵀx,  x̂ = relu(W·h + b),  L = Σ_i I_i·(x_i − x̂_i)²

Each feature x_i is 0, or uniform in [0, 1] with probability `density`. Many models are trained at once.

Source: Elhage et al. 2022, "Toy Models of Superposition", transformer-circuits.pub.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ToyModels", "ToyRecipe", "train_toy_models"]


@dataclass(frozen=True)
class ToyRecipe:
    """How the models are trained. Adam's learning rate falls linearly to 0 over the last half."""

    steps: int = 3000
    batch: int = 512
    lr: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class ToyModels:
    """S trained models.

    Attributes:
        weight: [S, n, m]; row i is feature i's direction in the m hidden dimensions. bias: [S, n].
        density: [S]. importance: [S, n].
    """

    weight: Tensor
    bias: Tensor
    density: Tensor
    importance: Tensor

    @property
    def gram(self) -> Tensor:
        """W·Wᵀ, [S, n, n]: norms² on the diagonal, interference beside it (the paper's WᵀW)."""
        return self.weight @ self.weight.mT

    @property
    def norms(self) -> Tensor:
        """‖W_i‖, [S, n]: about 1 where a feature is represented, 0 where it is not."""
        lengths: Tensor = torch.linalg.vector_norm(self.weight, dim=-1)
        return lengths

    @property
    def interference(self) -> Tensor:
        """Σ_{j≠i} (Ŵ_i·W_j)², [S, n]: 0 where a feature has a dimension of its own."""
        projected = torch.nn.functional.normalize(self.weight, dim=-1) @ self.weight.mT
        return projected.square().sum(-1) - self.norms.square()

    @property
    def dimensions(self) -> Tensor:
        """D_i = ‖W_i‖² / Σ_j (Ŵ_i·W_j)², [S, n]: the share of a dimension that feature i has."""
        size = self.norms.square()
        return size / (size + self.interference).clamp(min=1e-12)

    @property
    def dimensions_per_feature(self) -> Tensor:
        """D* = m / ‖W‖_F², [S]: hidden dimensions for each feature that is represented."""
        return self.weight.shape[-1] / self.weight.square().sum((1, 2)).clamp(min=1e-12)

    def loss(self, x: Tensor) -> Tensor:
        """The loss of each model, [S]. Args: x: [S, B, n]."""
        shown = torch.relu(torch.baddbmm(self.bias.unsqueeze(1), x @ self.weight, self.weight.mT))
        missed: Tensor = ((x - shown).square() * self.importance.unsqueeze(1)).sum(-1)
        return missed.mean(-1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Features for `loss`, [S, count, n]."""
        size = (len(self.density), count, self.weight.shape[1])
        present = torch.rand(size, generator=generator) < self.density.view(-1, 1, 1)
        return torch.rand(size, generator=generator) * present


def train_toy_models(
    density: Tensor,
    importance: Tensor,
    hidden: int,
    recipe: ToyRecipe,
    on_step: Callable[[], None] = lambda: None,
) -> ToyModels:
    """Train one model for each density.

    Args: density: [S], in (0, 1]. importance: [S, n]. hidden: m. on_step: called after every step.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    count, features = importance.shape
    spread = (2 / (features + hidden)) ** 0.5
    weight = (spread * torch.randn(count, features, hidden, generator=generator)).requires_grad_()
    bias = torch.zeros(count, features, requires_grad=True)
    models = ToyModels(weight, bias, density, importance)
    optimizer = torch.optim.Adam([weight, bias], lr=recipe.lr)
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.lr * min(1.0, 2 * (1 - step / recipe.steps))
        # The sum, so that no model's gradient depends on how many others are trained beside it.
        loss = models.loss(models.sample(recipe.batch, generator)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_step()
    return ToyModels(weight.detach(), bias.detach(), density, importance)
