from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from steerserve.experiments.fields import ShiftedSums, curves, patches, smooth_atoms
from steerserve.experiments.images import bars, diagonals
from steerserve.experiments.planted import SparseSums
from steerserve.sae.architectures.functional import from_modes


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def singular_values(atom: torch.Tensor) -> np.ndarray:
    """Of the (height, width) matrix of a one-hued atom."""
    return np.linalg.svd(atom.sum(0).numpy(), compute_uv=False)


def test_bars_have_rank_one_and_diagonals_have_not() -> None:
    for atom in bars(24, 12, draw()):
        assert singular_values(atom)[1] < 1e-6
    for atom in diagonals(24, 12, draw()):
        values = singular_values(atom)
        assert values[0] / np.linalg.norm(values) == pytest.approx(1 / math.sqrt(5), rel=1e-5)


@pytest.mark.parametrize("make", [bars, diagonals])
def test_planted_atoms_have_unit_norm_and_differ(make: object) -> None:
    atoms = make(24, 12, draw()).flatten(1)  # type: ignore[operator]
    similarity = atoms @ atoms.T
    torch.testing.assert_close(similarity.diagonal(), torch.ones(24))
    assert (similarity - torch.eye(24)).max() <= 0.6 + 1e-6


def test_more_atoms_than_there_is_room_for_are_refused() -> None:
    with pytest.raises(ValueError, match="expected room for 500 different atoms, found"):
        bars(500, 5, draw())


def test_samples_are_sparse_sums_of_the_atoms_and_noise_of_the_size_asked_for() -> None:
    atoms = bars(6, 12, draw())
    noisy, clean = SparseSums(atoms, active=2.0, noise=0.1).sample(4000, draw(1))
    strengths = np.linalg.lstsq(
        atoms.flatten(1).T.double().numpy(), clean.flatten(1).T.double().numpy(), rcond=None
    )[0]
    present = np.abs(strengths) > 1e-4
    assert present.sum(0).mean() == pytest.approx(2.0, abs=0.1)
    assert strengths[present].min() >= 0.5 - 1e-4
    assert strengths[present].max() <= 1.5 + 1e-4
    assert float((noisy - clean).std()) == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(
    ("kernels", "modes"), [(curves(16), (16,)), (patches(8), (8, 8))], ids=["1-D", "2-D"]
)
def test_a_field_is_the_sum_of_its_events_evaluated_anywhere(
    kernels: torch.Tensor, modes: tuple[int, ...]
) -> None:
    """Held to the Fourier series of each kernel, summed in numpy at t − s."""
    events = ShiftedSums(kernels, modes, active=3.0).sample(3, draw())
    grid = (35, 20)[: len(modes)]
    found = events.on_grid(grid)
    places = np.stack(np.meshgrid(*(np.arange(n) / n for n in grid), indexing="ij"), axis=-1)
    expected = np.zeros(found.shape)
    for i in range(3):
        for concept, place, strength in zip(
            events.concept[i], events.place[i], events.strength[i], strict=True
        ):
            expected[i, 0] += float(strength) * series(
                kernels[concept, 0].numpy(), modes, places - place.numpy()
            )
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
    assert (events.strength > 0).sum() > 3


def series(coefficients: np.ndarray, modes: tuple[int, ...], places: np.ndarray) -> np.ndarray:
    ranges = [[*range(m + 1), *range(-m, 0)] for m in modes[:-1]] + [list(range(modes[-1] + 1))]
    total = np.zeros(places.shape[:-1])
    for index in np.ndindex(*coefficients.shape):
        frequency = np.array([line[i] for line, i in zip(ranges, index, strict=True)])
        # The last axis holds frequencies from 0 on: each but 0 stands for its negative too.
        times = 1 if frequency[-1] == 0 else 2
        total += times * (coefficients[index] * np.exp(2j * np.pi * places @ frequency)).real
    return total


@pytest.mark.parametrize(
    ("kernels", "modes"), [(curves(16), (16,)), (patches(8), (8, 8))], ids=["1-D", "2-D"]
)
def test_planted_kernels_have_unit_norm_and_lose_little_to_the_band_limit(
    kernels: torch.Tensor, modes: tuple[int, ...]
) -> None:
    values = from_modes(kernels, modes, [64] * len(modes))
    torch.testing.assert_close(values.square().flatten(1).mean(1), torch.ones(6))
    far = values.flatten(1)[:, 64 // 2] if len(modes) == 1 else values[:, 0, 32, 32]
    assert far.abs().max() < 0.02 * values.abs().amax()


def test_atoms_at_fixed_places_have_unit_norm_and_differ() -> None:
    atoms = smooth_atoms(64, 16, 64, draw())
    similarity = atoms[:, 0] @ atoms[:, 0].T
    torch.testing.assert_close(similarity.diagonal(), torch.ones(64))
    assert (similarity - torch.eye(64)).max() < 0.95
