"""How much of what was planted was found."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "alive",
    "best_matches",
    "cosines",
    "explained_variance",
    "mmcs",
    "mmcs_everywhere",
    "shifted_cosines",
]


def cosines(planted: Tensor, learned: Tensor) -> Tensor:
    """[K, F] cosines between planted [K, ...] and learned [F, ...] atoms."""
    known, found = (torch.nn.functional.normalize(atoms.flatten(1), dim=1) for atoms in (planted, learned))
    return known @ found.T


def mmcs(similarity: Tensor) -> float:
    """Mean over planted atoms of the best cosine of a learned one: 1 where all were found.

    Args: similarity: [K, F, ...], over whose further axes the best is taken too.
    Source: Sharkey et al. 2022, mean max cosine similarity.
    """
    return float(similarity.detach().flatten(1).amax(1).mean())


def best_matches(similarity: Tensor) -> Tensor:
    """[K]: for each planted atom the learned one that is most like it. Args: similarity: [K, F]."""
    return similarity.argmax(1)


def shifted_cosines(planted: Tensor, learned: Tensor) -> Tensor:
    """Cosines between planted kernels moved by s and learned atoms left where they are, on a torus.

    Args: planted: [K, C, *grid]. learned: [F, C, *grid].
    Returns: [K, F, *grid], the shift s along the last axes.
    """
    axes = tuple(range(2 - planted.ndim, 0))
    grid = planted.shape[2:]
    product = torch.einsum(
        "kc...,fc...->kf...",
        torch.fft.rfftn(planted, dim=axes).conj(),
        torch.fft.rfftn(learned, dim=axes),
    )
    norms = planted.flatten(1).norm(dim=1).unsqueeze(1) * learned.flatten(1).norm(dim=1)
    spread = norms.view(*norms.shape, *[1] * len(grid)).clamp(min=1e-12)
    similarity: Tensor = torch.fft.irfftn(product, s=grid, dim=axes) / spread
    return similarity


def mmcs_everywhere(similarity: Tensor) -> float:
    """Mean over planted kernels *and shifts* of the best cosine of a learned atom as it stands.

    Below mmcs where a dictionary holds a kernel at some places only.

    Args: similarity: [K, F, *grid], from `shifted_cosines`.
    """
    return float(similarity.detach().amax(1).mean())


def explained_variance(x: Tensor, reconstruction: Tensor) -> float:
    """1 − E‖x − x̂‖² / E‖x − Ex‖², in float64. Args: both [n, ...]."""
    values, error = x.double().flatten(1), (x - reconstruction).detach().double().flatten(1)
    return float(1 - error.square().sum() / (values - values.mean(0)).square().sum())


def alive(z: Tensor) -> int:
    """How many features fire at all. Args: z: [n, F, ...]."""
    return int((z > 0).transpose(0, 1).flatten(1).any(1).sum())
