from __future__ import annotations

import pytest
import torch

from steerserve.theory.planted import PlantedData, zipf
from steerserve.theory.recovery import RecoverySetup, judge_recovery, planted_data, recover, settings_for
from steerserve.training.generated import train_on

SMALL = RecoverySetup(d_in=24, features=24, active=2.0, steps=400, batch=128)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("batchtopk", {}), pytest.param("standard", {"l1": 0.25}, marks=pytest.mark.slow)],
)
def test_a_small_planted_dictionary_is_found(architecture: str, options: dict[str, float]) -> None:
    found = recover(architecture, SMALL, options={"lr": 0.01, **options})
    assert found.mmcs > 0.9
    assert found.mcc > 0.85
    assert found.best.mean().item() == pytest.approx(found.mmcs, abs=1e-5)
    assert found.losses[-1][0] == SMALL.steps
    assert found.losses[-1][1] < 0.7 * found.losses[0][1]


def test_training_starts_from_other_directions_than_the_planted_ones() -> None:
    settings = settings_for("topk", RecoverySetup(steps=1))
    data = planted_data(RecoverySetup())
    trained = train_on(data.batches(1024, 0), [settings])[0]
    assert judge_recovery(trained, data, []).mmcs < 0.5


def test_samples_are_sums_of_the_planted_features_by_their_strengths() -> None:
    data = PlantedData.random(torch.tensor([0.5, 0.1, 0.0]), 8, seed=0)
    x, strength = data.sample(4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x, strength @ data.features)
    assert (strength > 0).float().mean(0).tolist() == pytest.approx([0.5, 0.1, 0.0], abs=0.03)
    present = strength[strength > 0]
    assert 0.5 <= present.min() < present.max() <= 1.5
    assert data.l0 == pytest.approx(0.6)


def test_the_same_seed_gives_the_same_batches() -> None:
    data = PlantedData.random(torch.full((4,), 0.5), 8, seed=0)
    first, again, other = (next(data.batches(16, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_zipf_densities_fall_as_one_over_rank() -> None:
    density = zipf(100, 2.0)
    assert float(density.sum()) == pytest.approx(2.0)
    assert float(density[0] / density[9]) == pytest.approx(10)
