from __future__ import annotations

import numpy as np
import pytest
import torch

from steerserve.experiments.field_run import flat_input, resampled
from steerserve.experiments.recovery import (
    alive,
    best_matches,
    cosines,
    explained_variance,
    mmcs,
    mmcs_everywhere,
    shifted_cosines,
)
from steerserve.experiments.taps import convolve, reconstruct_by_taps
from steerserve.sae.architectures.functional import FunctionalSae, from_modes, to_modes


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_atoms_found_again_in_any_order_and_scale_have_an_mmcs_of_one() -> None:
    planted = random(5, 3, 4)
    similarity = cosines(planted, torch.cat((2 * planted.flip(0), random(4, 3, 4, seed=1))))
    assert mmcs(similarity) == pytest.approx(1)
    assert best_matches(similarity).tolist() == [4, 3, 2, 1, 0]


def test_an_atom_found_with_the_wrong_sign_is_not_found() -> None:
    planted = torch.eye(3)
    assert mmcs(cosines(planted, -planted)) == 0


def test_mmcs_is_the_mean_over_planted_atoms_of_the_best_cosine() -> None:
    assert mmcs(torch.tensor([[0.2, 0.9], [0.4, -1.0]])) == pytest.approx(0.65)


@pytest.mark.parametrize("grid", [(7,), (8,), (5, 6)])
def test_shifted_cosines_are_those_of_the_planted_kernel_rolled(grid: tuple[int, ...]) -> None:
    planted, learned = random(2, 3, *grid), random(4, 3, *grid, seed=1)
    found = shifted_cosines(planted, learned).numpy()
    assert found.shape == (2, 4, *grid)
    for shift in np.ndindex(*grid):
        moved = planted.roll(shift, tuple(range(2, 2 + len(grid))))
        np.testing.assert_allclose(
            found[(slice(None), slice(None), *shift)], cosines(moved, learned), atol=1e-12
        )


def test_a_kernel_known_at_one_place_only_is_not_found_everywhere() -> None:
    kernel = torch.zeros(1, 1, 8)
    kernel[0, 0, 3] = 1
    similarity = shifted_cosines(kernel, kernel.roll(2, 2))
    assert mmcs(similarity) == pytest.approx(1)
    assert mmcs_everywhere(similarity) == pytest.approx(1 / 8)


def test_explained_variance_is_one_at_best_and_zero_for_the_mean() -> None:
    x = random(100, 2, 3)
    assert explained_variance(x, x) == 1
    assert explained_variance(x, x.mean(0).expand_as(x)) == pytest.approx(0)


def test_a_feature_that_fires_once_anywhere_is_alive() -> None:
    z = torch.zeros(5, 3, 4)
    z[2, 1, 3] = 0.1
    assert alive(z) == 1
    assert alive(z[..., 3]) == 1


@pytest.mark.parametrize(("grid", "size"), [((8,), (8,)), ((9,), (4,)), ((8,), (5,)), ((6, 7), (4, 3))])
def test_a_convolution_is_the_sum_over_taps_around_zero(grid: tuple[int, ...], size: tuple[int, ...]) -> None:
    x, taps = random(2, 3, *grid), random(4, 3, *size, seed=1)
    axes = tuple(range(2, 2 + len(grid)))
    expected = torch.zeros(2, 4, *grid, dtype=torch.float64)
    for index in np.ndindex(*size):
        offset = [i if i < (n + 1) // 2 else i - n for i, n in zip(index, size, strict=True)]
        tap = taps[(slice(None), slice(None), *index)]
        expected += torch.einsum("oi,bi...->bo...", tap, x.roll(offset, axes))
    torch.testing.assert_close(convolve(x, taps), expected)


@pytest.mark.parametrize("grid", [(9,), (12,), (9, 12)])
def test_on_its_own_grid_a_functional_sae_is_the_convolution_with_its_taps(grid: tuple[int, ...]) -> None:
    modes = (3, 2)[: len(grid)]
    draw = torch.Generator().manual_seed(0)
    sae = FunctionalSae(modes, 2, 3, concept_price=0.1, domain_price=0.1, generator=draw).double()
    with torch.no_grad():
        sae.b_dec.normal_(generator=draw)
    x = random(4, 2, *grid)
    torch.testing.assert_close(reconstruct_by_taps(sae, x, grid), sae(x).detach())


def test_a_band_limited_function_is_resampled_exactly_and_back() -> None:
    coarse = random(2, 1, 7)
    finer = from_modes(to_modes(coarse, (3,)), (3,), (20,))
    torch.testing.assert_close(resampled(coarse, (20,)), finer)
    torch.testing.assert_close(resampled(finer, (7,)), coarse)


def test_the_flat_input_has_the_functions_norm() -> None:
    x = random(3, 2, 6, 5)
    torch.testing.assert_close(flat_input(x).square().flatten(1).sum(1), x.square().mean((2, 3)).sum(1))
