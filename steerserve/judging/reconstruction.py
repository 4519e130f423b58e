"""How well an SAE gives back what it was shown, and how often each of its features fires."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from steerserve.training.evaluate import Evaluation, evaluate

from .judged import Judged

__all__ = ["DENSE", "Histogram", "Reconstruction", "density_histogram", "judge_reconstruction"]

# A feature that fires on more than this share of the tokens is called dense.
DENSE = 0.1
_BINS_PER_DECADE = 4


@dataclass(frozen=True)
class Histogram:
    """How many features have a firing rate between two neighbouring edges.

    Attributes:
        edges: log10 of the rate, evenly spaced, one more than there are counts.
        counts: features in each bin; dead features are in none.
    """

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Reconstruction:
    """Attributes:
    evaluation: explained variance (centred), R² (uncentred), L0, dead share and per-feature statistics.
    dense_share: share of features that fire on more than a tenth of the tokens.
    histogram: of log10 firing rates.
    """

    evaluation: Evaluation
    dense_share: float
    histogram: Histogram


def judge_reconstruction(judged: Judged, batches: Iterable[Tensor]) -> Reconstruction:
    """Reconstruct every batch.

    Args: batches: [n, d_in] each, the raw residual stream, any float dtype, on the CPU; one row at least.
    """
    size = judged.resident.tokens_at_once
    found = evaluate(judged.resident, (part for batch in batches for part in batch.split(size)))
    dense = float((found.firing_rate > DENSE).float().mean())
    return Reconstruction(found, dense, density_histogram(found.firing_rate, found.tokens))


def density_histogram(firing_rate: Tensor, tokens: int) -> Histogram:
    """Bin log10 firing rates from 1 in `tokens`, the least that can be seen, to 1.

    Args: firing_rate: [F], shares of tokens.
    """
    lowest = math.floor(math.log10(1 / max(tokens, 10)))
    bins = -lowest * _BINS_PER_DECADE
    alive = firing_rate[firing_rate > 0].double().log10()
    counts = torch.histc(alive.float(), bins, lowest, 0).long()
    edges = [lowest + step / _BINS_PER_DECADE for step in range(bins + 1)]
    return Histogram(edges, counts.tolist())
