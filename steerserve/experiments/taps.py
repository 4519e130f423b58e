"""A functional SAE frozen into an ordinary convolution: kernels counted in grid points, not in lengths."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from steerserve.sae.architectures.functional import FunctionalSae, from_modes

__all__ = ["convolve", "reconstruct_by_taps"]


@torch.no_grad()
def reconstruct_by_taps(sae: FunctionalSae, x: Tensor, trained: Sequence[int]) -> Tensor:
    """x̂ by the convolutional SAE with this SAE's kernels as taps on the grid it was trained on.

    On that grid it is the same SAE. On another its kernels keep their number of points and so change their
    length, as those of any convolutional SAE do.

    Args: x: [B, C, *grid], of any resolution. trained: the grid on which the taps are read off.
    """
    points = prod(trained)
    encoder = from_modes(torch.view_as_complex(sae.encoder), sae.modes, trained) * prod(sae.coarse) / points
    decoder = sae.kernels(trained) / points
    spread = (-1, *[1] * len(sae.modes))
    z = torch.relu(convolve(x - sae.b_dec.view(spread), encoder) + sae.b_enc.view(spread))
    return convolve(z, decoder.transpose(0, 1)) + sae.b_dec.view(spread)


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """Circular convolution Σ_i taps[o, i] ∗ x[b, i], the taps' point 0 at index 0, negative ones at the end.

    Args: x: [B, I, *grid]. taps: [O, I, *size]; laid into the grid with zeros, or cut to it.
    Returns: [B, O, *grid].
    """
    axes = tuple(range(2 - x.ndim, 0))
    grid = x.shape[2:]
    for axis, points in zip(axes, grid, strict=True):
        taps = _resized(taps, axis, points)
    product = torch.einsum(
        "bi...,oi...->bo...", torch.fft.rfftn(x, dim=axes), torch.fft.rfftn(taps, dim=axes)
    )
    result: Tensor = torch.fft.irfftn(product, s=grid, dim=axes)
    return result


def _resized(taps: Tensor, axis: int, points: int) -> Tensor:
    """Taps around 0 on a grid of more points, with zeros between, or of fewer, the outermost cut off."""
    size = taps.shape[axis]
    least = min(size, points)
    after, before = (least + 1) // 2, least // 2
    head, tail = taps.narrow(axis, 0, after), taps.narrow(axis, size - before, before)
    gap = taps.new_zeros([*taps.shape[:axis], points - least, *taps.shape[axis:][1:]])
    return torch.cat((head, gap, tail), dim=axis)
