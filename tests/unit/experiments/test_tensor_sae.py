from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from steerserve.sae.architectures.tensor import TensorSae

Check = Callable[[torch.nn.Module, torch.Tensor], bool]
SHAPE = (3, 4, 5)


def small(d_sae: int = 6, l1: float = 0.1) -> TensorSae:
    sae = TensorSae(SHAPE, d_sae, l1=l1, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(1))
        sae.b_enc.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(2))
    return sae


def images(count: int = 7) -> torch.Tensor:
    return torch.randn(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_the_reconstruction_is_the_sum_of_outer_products() -> None:
    sae, x = small(), images()
    z = sae.encode(x).detach().numpy()
    factors = [factor.detach().numpy() for factor in (sae.colour, sae.height, sae.width)]
    expected = np.tile(sae.b_dec.detach().numpy(), (len(x), 1, 1, 1))
    for sample, activations in enumerate(z):
        for i, activation in enumerate(activations):
            a, b, c = (factor[i] / np.linalg.norm(factor[i]) for factor in factors)
            expected[sample] += activation * np.multiply.outer(np.multiply.outer(a, b), c)
    np.testing.assert_allclose(sae(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_every_atom_has_unit_norm_and_rank_one_along_each_axis() -> None:
    atoms = small().atoms().detach().numpy()
    np.testing.assert_allclose(np.linalg.norm(atoms.reshape(len(atoms), -1), axis=1), 1, rtol=1e-12)
    for atom in atoms:
        for axis in range(3):
            unfolded = np.moveaxis(atom, axis, 0).reshape(SHAPE[axis], -1)
            assert np.linalg.matrix_rank(unfolded, tol=1e-10) == 1


def test_an_atom_costs_the_sum_of_the_sides_and_not_their_product() -> None:
    sizes = [sum(p.numel() for p in small(d_sae).parameters()) for d_sae in (1, 2)]
    encoder = 3 * 4 * 5 + 1
    assert sizes[1] - sizes[0] == encoder + 3 + 4 + 5


def test_activations_are_never_negative_and_some_are_zero() -> None:
    z = small().encode(images(50))
    assert (z >= 0).all()
    assert 0 < (z == 0).double().mean() < 1


def test_the_loss_is_the_squared_error_and_the_price_of_the_activations() -> None:
    sae, x = small(l1=0.3), images()
    error = ((x - sae(x)) ** 2).sum() / len(x)
    torch.testing.assert_close(sae.loss(x), error + 0.3 * sae.encode(x).sum() / len(x))


def test_the_gradient_of_the_loss_is_the_numerical_one(check_gradients: Check) -> None:
    assert check_gradients(small(d_sae=3), images(4))


def test_an_image_of_another_shape_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"expected activations \[B, 3, 4, 5\], got \[2, 3, 5, 4\]"):
        small().encode(torch.zeros(2, 3, 5, 4, dtype=torch.float64))


def test_a_size_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected positive sizes"):
        TensorSae((3, 0, 4), 2, l1=0.1)
