"""The router of a switch SAE: which expert encodes a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Router"]


@dataclass(frozen=True)
class Router:
    """p = softmax(W·(x − b)); the expert of largest p encodes the token, alone.

    Attributes:
        weight: [E, d] float32, W.
        bias: [d] float32, b.
        heaviside: whether the expert's output counts whole instead of p times (an option of the trainer).
    Source: Mudide et al. 2024, arXiv:2410.08201, section 3.
    """

    weight: Tensor
    bias: Tensor
    heaviside: bool

    @property
    def experts(self) -> int:
        """E; expert i owns the features [i·F/E, (i+1)·F/E)."""
        return self.weight.shape[0]

    def to(self, device: torch.device | str) -> Router:
        """A copy on a device."""
        return Router(self.weight.to(device, copy=True), self.bias.to(device, copy=True), self.heaviside)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen expert of each token, and what its output is multiplied by.

        Args: x: [n, d] float32, in the model's own scale.
        Returns: [n] int64, and [n] float32.
        """
        p = torch.softmax((x - self.bias) @ self.weight.T, dim=-1)
        values, experts = p.topk(1, dim=-1)
        gain = torch.ones_like(values) if self.heaviside else values
        return experts[:, 0], gain[:, 0]
