"""sparsify's groupmax: features compete in k groups, and the largest of each group is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linear import Linear

__all__ = ["GroupMax"]


@dataclass(frozen=True, eq=False)
class GroupMax:
    """f_j = relu(pre_j) where j is the largest of its group, else 0; group g owns [g·F/k, (g+1)·F/k).

    Attributes:
        linear: gives relu(pre_j) of every feature, without a top k of its own.
        groups: k, which divides F.
    Source: github.com/EleutherAI/sparsify, `fused_encoder.py`.
    """

    linear: Linear
    groups: int

    def to(self, device: torch.device | str) -> GroupMax:
        return GroupMax(self.linear.to(device), self.groups)

    def tensors(self) -> dict[str, Tensor]:
        return self.linear.tensors()

    @property
    def flops_per_token(self) -> int:
        return self.linear.flops_per_token

    def encode(self, y: Tensor, x: Tensor) -> tuple[Tensor, None]:
        grouped = self.linear.encode(y, x)[0].unflatten(-1, (self.groups, -1))
        values, indices = grouped.max(dim=-1, keepdim=True)
        return torch.zeros_like(grouped).scatter_(-1, indices, values).flatten(-2), None
