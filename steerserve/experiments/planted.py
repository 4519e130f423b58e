"""Data with known atoms: each sample is a sum of few of them, at a strength of its own, in noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SparseSums"]


@dataclass(frozen=True)
class SparseSums:
    """x = Σ_k a_k atom_k + noise; each a_k is 0, or between ½ and 1½ with probability active/K.

    Attributes:
        atoms: [K, *shape], each of unit norm.
        active: atoms in a sample, on average.
        noise: standard deviation of the Gaussian noise on each value.
    """

    atoms: Tensor
    active: float
    noise: float

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` samples [count, *shape] with noise, and the same samples without it."""
        size = (count, len(self.atoms))
        present = torch.rand(size, generator=generator) < self.active / len(self.atoms)
        strength = present * (0.5 + torch.rand(size, generator=generator))
        clean = torch.tensordot(strength, self.atoms, dims=1)
        return clean + self.noise * torch.randn(clean.shape, generator=generator), clean
