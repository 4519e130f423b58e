"""The monosemanticity score MS: whether what a feature fires on is alike."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["monosemanticity"]

_COLUMNS_AT_ONCE = 1024


@torch.no_grad()
def monosemanticity(activations: Tensor, embeddings: Tensor) -> Tensor:
    """MS_k = Σ_{n<m} ã_nk ã_mk s_nm / Σ_{n<m} ã_nk ã_mk for each feature k.

    ã are the activations scaled to [0, 1] by each feature's least and largest, s the cosines of the texts'
    embeddings. The double sums are computed in time linear in the texts: with unit embeddings e,
    2·Σ_{n<m} ã_n ã_m s_nm = ‖Σ ã_n e_n‖² − Σ ã_n²‖e_n‖².

    Args: activations: [T, F], one number for each text. embeddings: [T, e]; a zero row is like nothing.
    Returns: [F] float64; NaN for a feature that fires on fewer than two texts, or on all of them alike.
    Source: Pach et al. 2025, arXiv:2504.02821, there of images; that it can be had in linear time is also
        noted by arXiv:2602.12403.
    """
    wide = embeddings.double()
    unit = wide / wide.norm(dim=1, keepdim=True).clamp(min=1e-12)
    lengths = unit.square().sum(1)
    scores = [_scores(part.double(), unit, lengths) for part in activations.split(_COLUMNS_AT_ONCE, dim=1)]
    return torch.cat(scores)


def _scores(a: Tensor, unit: Tensor, lengths: Tensor) -> Tensor:
    low, high = a.amin(0), a.amax(0)
    scaled = (a - low) / (high - low)
    squares = scaled.square()
    alike = (scaled.T @ unit).square().sum(1) - lengths @ squares
    weight = scaled.sum(0).square() - squares.sum(0)
    # The difference of two equal sums is not exactly zero.
    return torch.where(weight > 1e-9, alike / weight, torch.nan)
