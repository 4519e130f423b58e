"""The experiments with toy models: pictures of W·Wᵀ, dimensions per feature, and the phase change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .phase import PHASES, PhaseDiagram, train_phases
from .superposition import ToyModels, ToyRecipe, train_toy_models

__all__ = ["Superposition", "SuperpositionSetup", "study_superposition"]

_REPRESENTED = 0.5


@dataclass(frozen=True)
class SuperpositionSetup:
    """How large the toy models are. Attributes:
    pictured: (n, m) of the models whose W·Wᵀ is shown; importances fall as 0.7^i.
    geometry: (n, m) of the models whose dimensions are counted; all features are equally important.
    pictures, densities, phases: how many densities of each, from 1 down.
    steps: of training. seed: decides starts and data.
    """

    pictured: tuple[int, int] = (20, 5)
    geometry: tuple[int, int] = (120, 15)
    pictures: int = 5
    densities: int = 12
    phases: int = 12
    steps: int = 1500
    seed: int = 0


@dataclass(frozen=True)
class Superposition:
    """Attributes: pictured, geometry: the trained models, one for each density. phases: the phase change."""

    pictured: ToyModels
    geometry: ToyModels
    phases: PhaseDiagram

    def numbers(self) -> dict[str, Any]:
        """What goes into the JSON."""
        return {
            "pictured": _by_density(self.pictured),
            "geometry": _by_density(self.geometry),
            "phase_change": {
                "density": _list(self.phases.density),
                "importance": _list(self.phases.importance),
                "found": [[PHASES[i] for i in row] for row in self.phases.found.tolist()],
                "least_loss": [[PHASES[i] for i in row] for row in self.phases.expected.tolist()],
                "agreement": self.phases.agreement,
            },
        }


def study_superposition(
    setup: SuperpositionSetup, on_step: Callable[[str], None] = lambda _: None
) -> Superposition:
    """Train all toy models. Args: on_step: called after every step with the name of its experiment."""
    recipe = ToyRecipe(steps=setup.steps, seed=setup.seed)
    n, m = setup.pictured
    density, importance = _down_from_one(setup.pictures, 0.01), 0.7 ** torch.arange(n)
    pictured = train_toy_models(
        density, importance.expand(len(density), n), m, recipe, lambda: on_step("pictured")
    )
    n, m = setup.geometry
    density = _down_from_one(setup.densities, 0.01)
    geometry = train_toy_models(density, torch.ones(len(density), n), m, recipe, lambda: on_step("geometry"))
    importance = torch.logspace(-1, 1, setup.phases)
    phases = train_phases(_down_from_one(setup.phases, 0.02), importance, recipe, lambda: on_step("phases"))
    return Superposition(pictured, geometry, phases)


def _down_from_one(count: int, least: float) -> torch.Tensor:
    return torch.logspace(0, float(torch.log10(torch.tensor(least))), count)


def _by_density(models: ToyModels) -> list[dict[str, Any]]:
    """One row a model: how many features are represented, and how much of each other they bear."""
    represented = models.norms > _REPRESENTED
    crowd = (models.interference * represented).sum(1) / represented.sum(1).clamp(min=1)
    rows = zip(
        _list(models.density),
        represented.sum(1).tolist(),
        _list(models.dimensions_per_feature),
        _list(crowd),
        models.dimensions.tolist(),
        strict=True,
    )
    names = ("density", "represented", "dimensions_per_feature", "mean_interference", "dimensions")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _list(values: torch.Tensor) -> list[float]:
    found: list[float] = values.tolist()
    return found
