"""The encoder of most SAEs: one product, and an activation of each feature or a top k of them all."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from steerserve.sae.activation import Activation

from .base import copied_matrix, copied_vector

__all__ = ["Linear"]


@dataclass(frozen=True, eq=False)
class Linear:
    """pre_j = (w_j·y + b_j)·s_j, then the activation formula (see FeatureRows), or the k largest, rectified.

    Attributes:
        weight: [F, d], the rows w_j. bias, scale: [F].
        activation: the per-feature numbers of the formula, [F] each.
        top_k: how many features of a token are kept; None for all.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    activation: Activation
    top_k: int | None

    def to(self, device: torch.device | str) -> Linear:
        act = self.activation
        return replace(
            self,
            weight=copied_matrix(self.weight, device),
            bias=copied_vector(self.bias, device),
            scale=copied_vector(self.scale, device),
            activation=Activation(*(copied_vector(getattr(act, f.name), device) for f in fields(act))),
        )

    def tensors(self) -> dict[str, Tensor]:
        act = self.activation
        own = {"bias": self.bias, "encoder": self.weight, "encoder_scale": self.scale}
        return own | {field.name: getattr(act, field.name) for field in fields(act)}

    @property
    def flops_per_token(self) -> int:
        return 2 * self.weight.numel()

    def encode(self, y: Tensor, x: Tensor) -> tuple[Tensor, None]:
        return self.features(y, 0, len(self.bias)), None

    def features(self, y: Tensor, start: int, length: int) -> Tensor:
        """The activations of features [start, start + length) alone, [n, length].

        Top-k is the k largest of these, as torch.topk picks them where some are equal.
        """

        def own(part: Tensor) -> Tensor:
            return part.narrow(0, start, length)

        pre = y @ own(self.weight).T
        pre.add_(own(self.bias)).mul_(own(self.scale))
        if self.top_k is not None:
            values, indices = pre.topk(min(self.top_k, length), dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter_(-1, indices, values.relu_())
        act = self.activation
        value = torch.maximum(own(act.scale) * pre + own(act.shift), own(act.floor))
        # So asked, a NaN stays one.
        return torch.where(pre <= own(act.threshold), 0.0, value)
