from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from steerserve.sae.architectures.functional import FunctionalSae, from_modes, to_modes

Check = Callable[[torch.nn.Module, torch.Tensor], bool]


def small(modes: tuple[int, ...] = (3,), channels: int = 2, d_sae: int = 3) -> FunctionalSae:
    draw = torch.Generator().manual_seed(0)
    sae = FunctionalSae(modes, channels, d_sae, concept_price=0.2, domain_price=0.3, generator=draw).double()
    with torch.no_grad():
        sae.encoder.add_(0.1 * torch.randn(sae.encoder.shape, dtype=torch.float64, generator=draw))
        sae.b_enc.uniform_(-0.3, 0.3, generator=draw)
        sae.b_dec.normal_(generator=draw)
    return sae


def functions(
    grid: tuple[int, ...], modes: tuple[int, ...], count: int = 4, channels: int = 2
) -> torch.Tensor:
    """Band-limited, the same functions whatever the grid."""
    draw = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, channels, *(2 * m + 1 for m in modes), dtype=torch.float64, generator=draw)
    return from_modes(to_modes(coarse, modes), modes, grid)


@pytest.mark.parametrize(
    ("grid", "modes"),
    [((7,), (3,)), ((8,), (3,)), ((20,), (3,)), ((9, 7), (3, 2)), ((6, 8), (2, 3)), ((5, 6, 7), (1, 2, 3))],
)
def test_modes_are_the_coefficients_of_the_fourier_series(
    grid: tuple[int, ...], modes: tuple[int, ...]
) -> None:
    """Held to the sum over exponentials, written out in numpy."""
    values = torch.randn(2, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = to_modes(values, modes).numpy()
    ranges = [[*range(m + 1), *range(-m, 0)] for m in modes[:-1]] + [list(range(modes[-1] + 1))]
    assert found.shape[1:] == tuple(len(line) for line in ranges)
    places = np.stack(np.meshgrid(*(np.arange(n) / n for n in grid), indexing="ij"))
    for index in np.ndindex(*found.shape[1:]):
        frequency = np.array([line[i] for line, i in zip(ranges, index, strict=True)])
        wave = np.exp(-2j * np.pi * np.tensordot(frequency, places, axes=1))
        expected = (values.numpy() * wave).mean(axis=tuple(range(1, len(grid) + 1)))
        np.testing.assert_allclose(found[(slice(None), *index)], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("grid", "modes"), [((7,), (3,)), ((16,), (3,)), ((9, 8), (3, 2)), ((4, 5, 7), (1, 2, 3))]
)
def test_a_band_limited_function_survives_its_modes(grid: tuple[int, ...], modes: tuple[int, ...]) -> None:
    values = functions(grid, modes)
    torch.testing.assert_close(from_modes(to_modes(values, modes), modes, grid), values)


def test_encoding_is_a_circular_convolution_then_a_relu() -> None:
    """Held to the double loop over places, with the kernels read off on the grid."""
    sae, x = small(), functions((8,), (3,))
    kernels = from_modes(torch.view_as_complex(sae.encoder), (3,), (8,)).detach().numpy() * 7
    centred = (x - sae.b_dec.view(-1, 1)).detach().numpy()
    pre = np.zeros((len(x), 3, 8))
    for t in range(8):
        for s in range(8):
            pre[:, :, t] += centred[:, :, s] @ kernels[:, :, (t - s) % 8].T / 8
    expected = np.maximum(pre + sae.b_enc.detach().numpy()[:, None], 0)
    np.testing.assert_allclose(sae.encode(x).detach().numpy(), expected, atol=1e-12)
    assert 0 < (expected == 0).mean() < 1


def test_a_spike_of_activation_writes_the_kernel_at_its_place() -> None:
    sae = small((3, 2))
    z = torch.zeros(1, 3, 8, 6, dtype=torch.float64)
    z[0, 1, 5, 2] = 8 * 6
    expected = sae.kernels((8, 6))[1].roll((5, 2), (1, 2)) + sae.b_dec.view(-1, 1, 1)
    torch.testing.assert_close(sae.decode(z)[0], expected)


@pytest.mark.parametrize("grid", [(7,), (8,), (40,)])
def test_kernels_have_unit_norm_on_every_grid(grid: tuple[int, ...]) -> None:
    norms = small().kernels(grid).square().mean(2).sum(1)
    torch.testing.assert_close(norms, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("modes", [(3,), (3, 2)])
def test_a_function_moved_by_a_point_moves_its_activations_by_a_point(modes: tuple[int, ...]) -> None:
    sae, x = small(modes), functions((10, 8)[: len(modes)], modes)
    torch.testing.assert_close(sae.encode(x.roll(1, dims=2)), sae.encode(x).roll(1, dims=2))


@pytest.mark.parametrize(("modes", "grid"), [((3,), (8,)), ((3, 2), (9, 6))])
def test_activation_functions_are_the_same_on_a_finer_grid(
    modes: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    """Every second point of the finer grid is a point of the coarser one."""
    sae = small(modes)
    finer = tuple(2 * n for n in grid)
    coarse, fine = sae.encode(functions(grid, modes)), sae.encode(functions(finer, modes))
    every_second = (..., *[slice(None, None, 2)] * len(grid))
    torch.testing.assert_close(fine[every_second], coarse)


def test_reconstructions_and_losses_settle_as_the_grid_gets_finer() -> None:
    sae = small()
    losses = [float(sae.loss(functions((n,), (3,))).detach()) for n in (7, 64, 512, 1024)]
    assert abs(losses[2] - losses[3]) < 1e-4 * losses[3]
    assert abs(losses[1] - losses[3]) < abs(losses[0] - losses[3])


def test_the_loss_is_the_mean_squared_error_and_both_norms_of_the_activations() -> None:
    sae, x = small(), functions((8,), (3,))
    z = sae.encode(x)
    error = (x - sae(x)).square().mean(2).sum(1)
    norms = 0.2 * z.square().mean(2).sqrt().sum(1) + 0.3 * z.abs().mean(2).sum(1)
    torch.testing.assert_close(sae.loss(x), (error + norms).mean())


@pytest.mark.parametrize("modes", [(2,), (1, 2)])
def test_the_gradient_of_the_loss_is_the_numerical_one(
    modes: tuple[int, ...], check_gradients: Check
) -> None:
    sae = small(modes, d_sae=2)
    assert check_gradients(sae, functions((6, 7)[: len(modes)], modes, count=3))


def test_a_silent_feature_has_a_gradient_of_zero_and_not_nan() -> None:
    sae = small()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    sae.loss(functions((8,), (3,))).backward()
    assert sae.encoder.grad is not None
    assert (sae.encoder.grad == 0).all()


def test_a_grid_too_coarse_for_the_modes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least \[7\] points for modes \[3\], got \[6\]"):
        small().encode(torch.zeros(1, 2, 6, dtype=torch.float64))


def test_functions_with_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected functions \[B, 2, N\], got \[1, 3, 8\]"):
        small().encode(torch.zeros(1, 3, 8, dtype=torch.float64))


def test_a_functional_sae_of_no_modes_is_refused() -> None:
    with pytest.raises(ValueError, match="expected positive sizes"):
        FunctionalSae((), 1, 2, concept_price=0.1, domain_price=0.1)
