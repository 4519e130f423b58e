"""Scores of a detector: area under the ROC curve, and F1 at the best threshold."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["auroc", "best_threshold", "f1_at"]


def auroc(scores: Tensor, truth: Tensor) -> float:
    """The chance that a positive scores above a negative, ties counted half; 0.5 where either is missing.

    Args: scores: [n]. truth: [n] bool.
    Source: Mann and Whitney's U over n₊·n₋.
    """
    positives = int(truth.sum())
    negatives = len(truth) - positives
    if positives == 0 or negatives == 0:
        return 0.5
    _, place, counts = torch.unique(scores, sorted=True, return_inverse=True, return_counts=True)
    # The mean rank (from 1) of each group of equal scores.
    ranks = counts.cumsum(0).double() - (counts.double() - 1) / 2
    total = float(ranks[place][truth].sum())
    return (total - positives * (positives + 1) / 2) / (positives * negatives)


def best_threshold(scores: Tensor, truth: Tensor) -> float:
    """The threshold t for which "score > t" has the highest F1.

    Args: scores: [n]. truth: [n] bool.
    Returns: a value between two scores, or below all of them.
    """
    ordered, order = scores.double().sort(descending=True)
    hits = truth[order].double().cumsum(0)
    said = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)
    f1 = 2 * hits / (said + truth.sum())
    # Equal scores cannot be told apart: only the last of a run is a place to cut.
    last = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    last[:-1] = ordered[:-1] > ordered[1:]
    cut = int(torch.where(last, f1, -1.0).argmax())
    if cut == len(scores) - 1:
        return float(ordered[-1]) - 1.0
    return float((ordered[cut] + ordered[cut + 1]) / 2)


def f1_at(scores: Tensor, truth: Tensor, threshold: float) -> float:
    """F1 of "score > threshold"; 0 where nothing is said and nothing is true."""
    said = scores.double() > threshold
    both = int((said & truth).sum())
    return 2 * both / max(int(said.sum()) + int(truth.sum()), 1)
