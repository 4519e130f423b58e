"""The encoder of a Kron SAE: each feature is the geometric mean of two of a few pre-activations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import copied_matrix, copied_vector

__all__ = ["Kron"]


@dataclass(frozen=True, eq=False)
class Kron:
    """u = P·y + b_P and v = Q·y + b_Q in each of h heads; z_ij = √(u_i·v_j) where both are positive, else 0.

    Feature ((head·m) + i)·n + j is z_ij of that head; the k largest of all h·m·n are kept.

    Attributes:
        left: [h·m, d], P of every head. left_bias: [h·m].
        right: [h·n, d], Q of every head. right_bias: [h·n].
        heads: h.
        top_k: k.
    Source: Kurochkin et al. 2025, arXiv:2505.22255, §3.
    """

    left: Tensor
    left_bias: Tensor
    right: Tensor
    right_bias: Tensor
    heads: int
    top_k: int

    def to(self, device: torch.device | str) -> Kron:
        return replace(
            self,
            left=copied_matrix(self.left, device),
            left_bias=copied_vector(self.left_bias, device),
            right=copied_matrix(self.right, device),
            right_bias=copied_vector(self.right_bias, device),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {
            "left": self.left,
            "left_bias": self.left_bias,
            "right": self.right,
            "right_bias": self.right_bias,
        }

    @property
    def flops_per_token(self) -> int:
        return 2 * (self.left.numel() + self.right.numel())

    def encode(self, y: Tensor, x: Tensor) -> tuple[Tensor, None]:
        u = (y @ self.left.T).add_(self.left_bias).relu_().view(len(y), self.heads, -1, 1)
        v = (y @ self.right.T).add_(self.right_bias).relu_().view(len(y), self.heads, 1, -1)
        products = (u * v).flatten(1)
        # The root keeps their order, and is taken of few.
        values, indices = products.topk(min(self.top_k, products.shape[1]), dim=-1, sorted=False)
        return torch.zeros_like(products).scatter_(-1, indices, values.sqrt_()), None
