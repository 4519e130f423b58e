"""The encoder of a VAEase SAE at inference: a mean, and a gate that says how much of it is known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import copied_matrix, copied_vector

__all__ = ["VaEase"]


@dataclass(frozen=True, eq=False)
class VaEase:
    """μ = W_enc·y + b_enc, s = W_gate·y + b_gate;  f = (1 − σ)⊙μ with σ = sigmoid(−s) where s > 0, else 0.

    The noise of training is left out (ε = 0). A feature is active where its σ is below ½: see the trainer's
    `vaease`. Alone among the SAEs' features, these may be negative.

    Attributes:
        weight, gate: [F, d]. bias, gate_bias: [F].
    Source: Lu et al. 2025, arXiv:2506.04859.
    """

    weight: Tensor
    bias: Tensor
    gate: Tensor
    gate_bias: Tensor

    def to(self, device: torch.device | str) -> VaEase:
        return replace(
            self,
            weight=copied_matrix(self.weight, device),
            bias=copied_vector(self.bias, device),
            gate=copied_matrix(self.gate, device),
            gate_bias=copied_vector(self.gate_bias, device),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {
            "bias": self.bias,
            "encoder": self.weight,
            "gate": self.gate,
            "gate_bias": self.gate_bias,
        }

    @property
    def flops_per_token(self) -> int:
        return 2 * (self.weight.numel() + self.gate.numel())

    def encode(self, y: Tensor, x: Tensor) -> tuple[Tensor, None]:
        mean = (y @ self.weight.T).add_(self.bias)
        s = (y @ self.gate.T).add_(self.gate_bias)
        shut = s <= 0  # so asked, a NaN stays one
        return s.sigmoid_().mul_(mean).masked_fill_(shut, 0.0), None
