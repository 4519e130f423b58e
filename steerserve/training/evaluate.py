"""How good an SAE is, measured on tokens it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Autoencoder", "DetectorCounts", "Evaluation", "evaluate"]


class Autoencoder(Protocol):
    """What is evaluated: an SAE in training, an opened one, or a `Resident`, which can be any of those."""

    @property
    def d_in(self) -> int:
        """Width of the residual stream."""

    @property
    def d_sae(self) -> int:
        """Number of features."""

    def autoencode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations [tokens, d_sae] and reconstruction [tokens, d_in]. Args: x: [tokens, d_in]."""


@dataclass(frozen=True)
class Evaluation:
    """Attributes:
    explained_variance: 1 − E‖x − x̂‖² / (E‖x‖² − ‖Ex‖²), in float64.
    r2: 1 − E‖x − x̂‖² / E‖x‖², uncentred.
    l0: active features per token.
    dead_fraction: share of features that fired on no token.
    tokens: how many were seen.
    max_activation: [F] float32, raw units. firing_rate: [F] float32, share of tokens.
    """

    explained_variance: float
    r2: float
    l0: float
    dead_fraction: float
    tokens: int
    max_activation: Tensor
    firing_rate: Tensor

    def numbers(self) -> dict[str, float | int]:
        """What goes into a manifest's training summary."""
        return {
            "explained_variance": self.explained_variance,
            "r2": self.r2,
            "l0": self.l0,
            "dead_fraction": self.dead_fraction,
        }


@torch.no_grad()
def evaluate(sae: Autoencoder, batches: Iterable[Tensor]) -> Evaluation:
    """Reconstruct every batch and count what fires.

    Args: batches: [n, d_in] each, the raw residual stream, any float dtype; at least one row in all.
    """
    total = torch.zeros(sae.d_in, dtype=torch.float64)
    squares = errors = 0.0
    tokens = 0
    fired, strongest = torch.zeros(sae.d_sae, dtype=torch.int64), torch.zeros(sae.d_sae)
    for batch in batches:
        x = batch.float()
        f, reconstruction = (part.cpu() for part in sae.autoencode(x))
        wide = x.double()
        errors += float((wide - reconstruction).square().sum())
        squares += float(wide.square().sum())
        total += wide.sum(0)
        tokens += len(x)
        # Some features of VAEase are negative.
        fired += (f != 0).sum(0)
        strongest = torch.maximum(strongest, f.amax(0))
    if tokens == 0:
        raise ValueError("expected at least one row to evaluate on")
    # Sums rather than means: the count cancels in both ratios.
    spread = squares - float(total.square().sum()) / tokens
    return Evaluation(
        explained_variance=1 - errors / spread if spread > 0 else 0.0,
        r2=1 - errors / squares if squares > 0 else 0.0,
        l0=int(fired.sum()) / tokens,
        dead_fraction=float((fired == 0).float().mean()),
        tokens=tokens,
        max_activation=strongest,
        firing_rate=(fired.double() / tokens).float(),
    )


class DetectorCounts:
    """Every feature judged as a detector of every label, token by token: it says yes where it fires.

    Args: d_sae: number of features F. labels: number of labels L.
    """

    def __init__(self, d_sae: int, labels: int) -> None:
        self._both = torch.zeros(d_sae, labels, dtype=torch.float64)
        self._fired = torch.zeros(d_sae, 1, dtype=torch.float64)
        self._true = torch.zeros(labels, dtype=torch.float64)

    def update(self, f: Tensor, truth: Tensor) -> None:
        """Count one batch. Args: f: [n, F] activations. truth: [n, L] bool, whether the label holds there."""
        fires, holds = (f > 0).float(), truth.float()
        self._both += fires.T @ holds
        self._fired += fires.sum(0, dtype=torch.float64).unsqueeze(1)
        self._true += holds.sum(0, dtype=torch.float64)

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """Precision, recall and F1, [F, L] float64 each; 0 where a feature or a label never occurred."""
        precision = self._both / self._fired.clamp(min=1)
        recall = self._both / self._true.clamp(min=1)
        f1 = 2 * self._both / (self._fired + self._true).clamp(min=1)
        return precision, recall, f1
