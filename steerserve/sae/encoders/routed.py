"""The encoder of a switch SAE: a router sends each token to one expert, and the others are not computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steerserve.sae.router import Router

from .linear import Linear

__all__ = ["Routed"]


@dataclass(frozen=True, eq=False)
class Routed:
    """Expert i owns the features [i·F/E, (i+1)·F/E) of `linear`; a top k is taken of those alone.

    Source: Mudide et al. 2024, arXiv:2410.08201, section 3.
    """

    linear: Linear
    router: Router

    def to(self, device: torch.device | str) -> Routed:
        return Routed(self.linear.to(device), self.router.to(device))

    def tensors(self) -> dict[str, Tensor]:
        own = {"router.weight": self.router.weight, "router.bias": self.router.bias}
        return self.linear.tensors() | own

    @property
    def flops_per_token(self) -> int:
        return 2 * self.router.weight.numel() + self.linear.flops_per_token // self.router.experts

    def encode(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        expert, weight = self.router.route(x)
        d_sae = len(self.linear.bias)
        size = d_sae // self.router.experts
        f = y.new_zeros(y.shape[0], d_sae)
        for e in expert.unique().tolist():
            tokens = torch.nonzero(expert == e)[:, 0]
            own = self.linear.features(y.index_select(0, tokens), e * size, size)
            f.narrow(1, e * size, size).index_copy_(0, tokens, own)
        return f, weight
