"""The one form in which features are served, whatever the architecture they were trained in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FeatureRows"]


@dataclass(frozen=True)
class FeatureRows:
    """n features reduced to one activation formula.

        z_j = w_j · x + b_j
        f_j = max(s_j·z_j + m_j, floor_j)  if z_j > θ_j  else 0

    Pre-biases and scalar input normalisations are folded in: `x` is the raw residual stream, f_j is in the
    SAE's own units, and f_j·d_j is the feature's part of the reconstruction in the model's own scale.

    Attributes (float32, contiguous):
        encoder: [n, d], the rows w_j.
        bias: [n], b_j.
        threshold: [n], θ_j; −inf where the feature has none.
        scale: [n], s_j.
        shift: [n], m_j.
        floor: [n]; 0 for rectified features, −inf for the identity of a direction.
        decoder: [n, d], the rows d_j.
    """

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    scale: Tensor
    shift: Tensor
    floor: Tensor
    decoder: Tensor

    def __len__(self) -> int:
        return self.encoder.shape[0]

    def activations(self, x: Tensor) -> Tensor:
        """The formula above in plain torch: the reference every kernel is held to.

        Args: x: [tokens, d], the residual stream in the model's own scale, any float dtype.
        Returns: [tokens, n], float32, raw units.
        """
        z = x.float() @ self.encoder.T + self.bias
        return torch.where(z > self.threshold, torch.maximum(self.scale * z + self.shift, self.floor), 0.0)
