"""Weights as SAELens names them, with the input's scale folded in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import Export

__all__ = ["saelens_export"]


def saelens_export(
    architecture: str,
    parameters: Mapping[str, Tensor],
    scale: float,
    *,
    biases: Mapping[str, Tensor],
    unscaled: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Export:
    """The SAELens form of an SAE that was trained on scale·x.

    Its activations come out in the model's own scale while decoder rows keep their norm: f_j is the length of
    feature j in the residual stream. Every activation function here is homogeneous, so that biases and
    thresholds are divided by the scale and matrices stay.

    Args:
        parameters: encoder [F, d], decoder [F, d] and b_dec [d] among them.
        biases: what is divided by the scale besides b_dec. unscaled: what is not.
        config: what `cfg.json` says besides the architecture.
    """
    tensors = {
        "W_dec": parameters["decoder"],
        "W_enc": parameters["encoder"].T,
        "b_dec": parameters["b_dec"] / scale,
        **{name: bias / scale for name, bias in biases.items()},
        **(unscaled or {}),
    }
    kept = {name: tensor.detach().contiguous() for name, tensor in sorted(tensors.items())}
    return Export(kept, {"architecture": architecture, "apply_b_dec_to_input": True, **(config or {})})
