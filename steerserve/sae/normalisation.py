"""Normalisations of an SAE's input that depend on each token, so that no weight can absorb them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Normalisation", "Normalised", "normalise"]

Normalisation = Literal["none", "constant_norm_rescale", "layer_norm"]

_EPS = 1e-5


@dataclass(frozen=True)
class Normalised:
    """Tokens as the SAE sees them, and the way back: x = gain·out + mean.

    Attributes:
        x: [n, d] float32, normalised.
        gain: [n, 1] float32.
        mean: [n, 1] float32.
    """

    x: Tensor
    gain: Tensor
    mean: Tensor


def normalise(x: Tensor, how: Normalisation) -> Normalised:
    """Each token in the SAE's own scale.

    `layer_norm`: y = (x − μ)/(σ + 1e-5) with the unbiased σ, and back σ·out + μ, without the 1e-5.
    `constant_norm_rescale`: y = x·c with c = √d/‖x‖, and back out/c. The zero vector has no c: NaN.

    Args: x: [n, d] float32, in the model's own scale.
    Source: sae_lens 6.54, `SAE._setup_activation_normalization`; for the layer norm also OpenAI's
        sparse_autoencoder, `LN` and `Autoencoder.decode` (Gao et al. 2024, arXiv:2406.04093).
    """
    if how == "layer_norm":
        mean = x.mean(dim=-1, keepdim=True)
        centred = x - mean
        std = centred.std(dim=-1, keepdim=True)
        return Normalised(centred / (std + _EPS), std, mean)
    no_mean = torch.zeros_like(x[:, :1])
    if how == "constant_norm_rescale":
        factor = math.sqrt(x.shape[-1]) / x.norm(dim=-1, keepdim=True)
        return Normalised(x * factor, 1 / factor, no_mean)
    return Normalised(x, torch.ones_like(no_mean), no_mean)
