"""What both experiments are compared with: a standard SAE on the activation's values as one flat vector."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

__all__ = ["FlatSae", "parameter_count"]


class FlatSae(nn.Module):
    """x̂ = W_decᵀ relu(W_enc·(x − b_dec) + b_enc) + b_dec with unit rows in W_dec: ReLU and L1.

    Args:
        shape: of one activation; it only decides the length of the vector and the shape of atoms().
        d_sae: number of atoms F.
        l1: λ, the price of a unit of activation.
    Source: Bricken et al. 2023, with atoms normalised in the forward pass, as in the SAEs it is held against.
    """

    def __init__(
        self, shape: Sequence[int], d_sae: int, *, l1: float, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.shape, self.d_sae, self.l1 = tuple(shape), d_sae, l1
        start = normalize(torch.randn(d_sae, prod(shape), generator=generator), dim=1)
        self.w_dec, self.w_enc = nn.Parameter(start), nn.Parameter(start.clone())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(prod(shape)))

    def atoms(self) -> Tensor:
        """[F, *shape], each of unit norm."""
        atoms: Tensor = normalize(self.w_dec, dim=1).unflatten(1, self.shape)
        return atoms

    def encode(self, x: Tensor) -> Tensor:
        """[B, *shape] → [B, F], not negative."""
        return torch.relu((x.flatten(1) - self.b_dec) @ self.w_enc.T + self.b_enc)

    def decode(self, z: Tensor) -> Tensor:
        """[B, F] → [B, *shape]."""
        x: Tensor = (z @ normalize(self.w_dec, dim=1) + self.b_dec).unflatten(1, self.shape)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """x̂: [B, *shape]."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor) -> Tensor:
        """Mean over the batch of ‖x − x̂‖² + λ Σ_i z_i; a scalar."""
        z = self.encode(x)
        return ((x - self.decode(z)).square().flatten(1).sum(1) + self.l1 * z.sum(1)).mean()


def parameter_count(model: nn.Module) -> int:
    """Trained numbers of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
