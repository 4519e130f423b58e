from __future__ import annotations

import numpy as np
import pytest
import torch

from steerserve.theory.phase import PHASES, expected_phase, solution_losses, train_phases
from steerserve.theory.superposition import ToyModels, ToyRecipe, train_toy_models

RECIPE = ToyRecipe(steps=600, batch=256, lr=0.02)


def fresh(models: ToyModels, count: int = 20_000) -> torch.Tensor:
    return models.sample(count, torch.Generator().manual_seed(9))


def handmade(weight: list[list[float]], importance: list[float], density: float) -> ToyModels:
    return ToyModels(
        torch.tensor([weight]),
        torch.zeros(1, len(weight)),
        torch.tensor([density]),
        torch.tensor([importance]),
    )


def test_with_density_one_the_model_is_pca() -> None:
    """Its loss is what numpy's PCA with as many components leaves of the weighted data."""
    importance = torch.tensor([[1.0, 0.8, 0.6, 0.4, 0.3, 0.2]])
    models = train_toy_models(torch.ones(1), importance, 2, RECIPE)
    x = fresh(models)
    weighted = (x[0] * importance[0].sqrt()).double().numpy()
    left_out = np.linalg.eigvalsh(np.cov(weighted.T))[:-2].sum()
    assert float(models.loss(x)[0]) == pytest.approx(left_out, rel=0.02)
    assert models.norms[0, :2].tolist() == pytest.approx([1, 1], abs=0.03)
    assert float(models.norms[0, 2:].max()) < 0.1


@pytest.mark.slow
def test_sparse_features_share_dimensions_and_dense_ones_do_not() -> None:
    density = torch.tensor([1.0, 0.03])
    models = train_toy_models(density, torch.ones(2, 12), 3, RECIPE)
    assert models.dimensions_per_feature[0].item() == pytest.approx(1, abs=0.1)
    assert models.dimensions_per_feature[1].item() < 0.6
    assert int((models.norms[1] > 0.5).sum()) >= 6


def test_a_pair_has_half_a_dimension_each_and_a_pentagon_two_fifths() -> None:
    pair = handmade([[1.0], [-1.0]], [1.0, 1.0], 0.1)
    assert pair.dimensions.flatten().tolist() == pytest.approx([0.5, 0.5])
    assert pair.interference.flatten().tolist() == pytest.approx([1.0, 1.0])
    angles = 2 * np.pi * np.arange(5) / 5
    pentagon = handmade(np.stack([np.cos(angles), np.sin(angles)], 1).tolist(), [1.0] * 5, 0.1)
    assert pentagon.dimensions.flatten().tolist() == pytest.approx([0.4] * 5, rel=1e-5)
    assert pentagon.dimensions_per_feature.item() == pytest.approx(0.4)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("importance", [0.3, 2.0])
def test_the_closed_form_losses_are_those_of_the_three_solutions(density: float, importance: float) -> None:
    wanted = solution_losses(torch.tensor(density), torch.tensor(importance)).tolist()
    for number, weight in enumerate(([[1.0], [0.0]], [[0.0], [1.0]], [[1.0], [-1.0]])):
        models = handmade(weight, [1.0, importance], density)
        if number < 2:  # What is left out is guessed by its mean.
            models.bias[0, 1 - number] = density / 2
        x = fresh(models, 400_000)
        assert float(models.loss(x)[0]) == pytest.approx(wanted[number], rel=0.02)


def test_superposition_ends_at_a_density_of_four_sevenths_where_both_matter_the_same() -> None:
    """p²/3 < p/3 − p²/4 for p < 4/7."""
    density = torch.tensor([0.56, 0.58])
    assert [PHASES[i] for i in expected_phase(density, torch.ones(2) * 0.999)] == ["superposed", "ignored"]


def test_training_arrives_at_the_phase_of_least_loss_away_from_the_borders() -> None:
    density, importance = torch.tensor([1.0, 0.03]), torch.tensor([0.1, 0.7, 3.0])
    diagram = train_phases(density, importance, RECIPE)
    assert [[PHASES[i] for i in row] for row in diagram.found.tolist()] == [
        ["ignored", "superposed"],
        ["ignored", "superposed"],
        ["dedicated", "superposed"],
    ]
    assert diagram.agreement == 1.0


def test_a_models_training_does_not_depend_on_the_others_seed_for_seed() -> None:
    once, again = (train_toy_models(torch.ones(1), torch.ones(1, 4), 2, RECIPE) for _ in range(2))
    assert torch.equal(once.weight, again.weight)
