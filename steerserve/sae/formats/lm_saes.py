"""What Llama Scope's and OpenMOSS' newer files have in common: norms of a data set, and gating on pre·‖d‖.

Both were trained on s·x with s = √d / average norm. A scalar s folds (see Stored); what remains of each
layout is how its threshold translates into one per feature, in units of pre = W·(s·x) + b.

Source: github.com/OpenMOSS/Language-Model-SAEs, `sae.py`: `encode`, `standardize_parameters_of_dataset_norm`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steerserve.sae.hook import Hook

from .common import constant, row_norms, stream
from .fields import Fields

__all__ = ["Scales", "per_feature_threshold", "place", "refusal"]

_SMALLEST = 1e-30


@dataclass(frozen=True)
class Scales:
    """s of what the SAE reads and of what it writes; equal unless their average norms were measured apart."""

    into: float
    out: float

    @classmethod
    def of(cls, d_in: int, norm_in: float, norm_out: float) -> Scales:
        """From the average norms in the data set."""
        return cls(math.sqrt(d_in) / norm_in, math.sqrt(d_in) / norm_out)


def per_feature_threshold(threshold: float | Tensor, decoder: Tensor, *, by_norm: bool) -> Tensor:
    """θ_j = θ/‖d_j‖: pre·‖d_j‖ > θ is pre > θ_j.

    A feature whose decoder row is zero gets a threshold that nothing reaches, as 0 > θ never holds.

    Args:
        threshold: θ, one or [F], positive.
        decoder: [F, d]. by_norm: whether norms count at all (`sparsity_include_decoder_norm`).
    Returns: [F] float32.
    """
    d_sae = decoder.shape[0]
    theta = threshold.float() if isinstance(threshold, Tensor) else constant(threshold, d_sae)
    if not by_norm:
        return theta
    return torch.clamp(theta.double() / row_norms(decoder).double().clamp(min=_SMALLEST), max=3e38).float()


def place(config: Fields) -> tuple[Hook | None, str | None]:
    """Where it was trained, or why it is not served there: transcoders read one place and write another."""
    source, target = config.text("hook_point_in"), config.text("hook_point_out")
    if source is None:
        return None, None
    if target not in (None, source):
        return None, f"it is a transcoder from `{source}` to `{target}`: not served"
    return stream(source)


def refusal(config: Fields) -> str | None:
    """Why an SAE of this configuration cannot be served exactly, or None if it can."""
    if config.flag("use_glu_encoder", default=False):
        return "its encoder is gated by a second one (`use_glu_encoder`): not served"
    act = config.text("act_fn") or "jumprelu"
    if act.lower() not in ("jumprelu", "relu"):
        return f"its `act_fn` is {act[:40]}, not jumprelu: not served (lm_saes converts it)"
    norm = config.text("norm_activation") or "dataset-wise"
    if norm not in ("dataset-wise", "inference"):
        return f"its `norm_activation` is {norm[:40]}, not dataset-wise: not served"
    return None
