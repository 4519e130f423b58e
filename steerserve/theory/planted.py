"""Data whose features are known: sparse sums of more planted directions than there are dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PlantedData", "zipf"]


@dataclass(frozen=True)
class PlantedData:
    """x = Σ_k a_k·feature_k; a_k is 0, or uniform in [½, 1½] with a probability of its own.

    Attributes:
        features: [K, d], unit rows. density: [K], how probable each is.
    """

    features: Tensor
    density: Tensor

    @classmethod
    def random(cls, density: Tensor, d_in: int, seed: int) -> PlantedData:
        """Directions without structure. Args: density: [K]."""
        # Training starts from normal numbers too, of a seed that is likely the same one: 0.
        generator = torch.Generator().manual_seed(seed + 0x5EED)
        rows = torch.randn(len(density), d_in, generator=generator)
        return cls(torch.nn.functional.normalize(rows, dim=-1), density)

    @property
    def l0(self) -> float:
        """Features in a sample, on average."""
        return float(self.density.sum())

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Samples [count, d] and the strengths of the features in them, [count, K]."""
        size = (count, len(self.density))
        present = torch.rand(size, generator=generator) < self.density
        strength = present * (0.5 + torch.rand(size, generator=generator))
        return strength @ self.features, strength

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """[size, d] without end; the same seed gives the same batches."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.sample(size, generator)[0]


def zipf(count: int, l0: float, exponent: float = 1.0) -> Tensor:
    """[count] densities ∝ rank^−exponent with the sum `l0`; at most ½ each, so the sum may be less."""
    shares = torch.arange(1, count + 1, dtype=torch.float32) ** -exponent
    return (shares * (l0 / shares.sum())).clamp(max=0.5)
