"""Feature absorption: where a concept's latent stays silent because a more special one speaks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Absorption", "judge_absorption"]

# SAEBench's settings.
FRACTION_COSINE = 0.1
FULL_COSINE = 0.025
PROPORTION = 0.4
MOST_ABSORBERS = 3
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Absorption:
    """Attributes:
    fraction: mean share of the concept's projection that other latents carry in place of the main ones.
    full: share of tokens on which every main latent is silent and one other carries the projection.
    tokens: how many the probe found right, over which both are means.
    """

    fraction: float
    full: float
    tokens: int


@torch.no_grad()
def judge_absorption(
    contributions: Tensor, x: Tensor, decoder: Tensor, probe: Tensor, main: Sequence[int]
) -> Absorption:
    """Absorption of one concept on tokens where it is present and the probe says so.

    With unit probe direction p, latent j contributes gain·f_j·(d_j·p). The fraction of a token is
    a/(a + m), where m is what the main latents contribute and a the sum of the three largest positive
    contributions of others aligned with the probe (cosine ≥ 0.1), at most what is missing to x·p. It is 0 if
    nothing is missing or those three carry less than 0.4 of x·p, and 1 if m ≤ 0 otherwise.

    Args:
        contributions: [n, F], gain·f.
        x: [n, d], the stream of the same tokens.
        decoder: [F, d]. probe: [d], its weights. main: the concept's main latents.
    Source: Chanin et al. 2024, arXiv:2409.14507, and SAEBench's feature_absorption_calculator.py, of which
        these are the definitions and thresholds. There the tokens are words and the concepts first letters.
    """
    unit = probe / probe.norm()
    along = decoder @ unit
    cosine = along / decoder.norm(dim=1).clamp(min=1e-12)
    fractions, full = [], []
    for start in range(0, len(x), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        carried, whole = contributions[part] * along, x[part] @ unit
        fractions.append(_fraction(carried, whole, cosine, main))
        full.append(_full(contributions[part], carried, whole, cosine, main))
    if not fractions:
        return Absorption(0.0, 0.0, 0)
    return Absorption(
        float(torch.cat(fractions).double().mean()), float(torch.cat(full).double().mean()), len(x)
    )


def _fraction(carried: Tensor, whole: Tensor, cosine: Tensor, main: Sequence[int]) -> Tensor:
    by_main = carried[:, list(main)].sum(1)
    others = cosine >= FRACTION_COSINE
    others[list(main)] = False
    absorbed = torch.where(others, carried, 0.0).clamp(min=0)
    absorbed = absorbed.topk(min(MOST_ABSORBERS, carried.shape[1]), dim=1).values.sum(1)
    share = torch.minimum(absorbed, whole - by_main)
    share = (share / (share + by_main)).clamp(0, 1)
    none = (by_main >= whole) | (absorbed / whole < PROPORTION)
    return torch.where(none, 0.0, torch.where(by_main <= 0, 1.0, share))


def _full(f: Tensor, carried: Tensor, whole: Tensor, cosine: Tensor, main: Sequence[int]) -> Tensor:
    silent = (f[:, list(main)] == 0).all(1)
    strongest, which = carried.max(1)
    return silent & (cosine[which] >= FULL_COSINE) & (whole >= 0) & (strongest / whole >= PROPORTION)
