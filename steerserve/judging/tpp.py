"""Targeted probe perturbation: whether taking a concept's latents away blinds its probe and no other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .probe import LinearProbe

__all__ = ["SIZES", "Perturbation", "judge_tpp"]

# How many latents are taken away.
SIZES = (2, 5, 10, 20, 50)


@dataclass(frozen=True)
class Perturbation:
    """Attributes:
    intended: mean fall of the accuracy of the concept's own probe.
    unintended: mean fall of the other probes' accuracies.
    score: intended − unintended.
    """

    intended: float
    unintended: float

    @property
    def score(self) -> float:
        """TPP."""
        return self.intended - self.unintended


@torch.no_grad()
def judge_tpp(
    choose: tuple[Tensor, Tensor],
    measure: tuple[Tensor, Tensor, Tensor],
    decoder: Tensor,
    probe: LinearProbe,
    sizes: tuple[int, ...] = SIZES,
) -> dict[int, Perturbation]:
    """TPP for each number of latents, the mean over concepts.

    Latents are ranked by max(mean inside − mean outside, 0)·(w·d_j) and ablated to zero; the reconstruction
    error stays in place. Accuracies count both classes alike.

    Args:
        choose: pooled activations [T, F] (mean of gain·f over a text) and labels [T] that rank the latents.
        measure: pooled activations [T, F], pooled stream [T, d] and labels [T] of other texts.
        decoder: [F, d]. probe: of the L labels, trained on pooled streams.
    Source: SAEBench (arXiv:2503.09532), scr_and_tpp; there negatives are subsampled to balance.
    """
    f, label = choose
    count = len(probe.weight)
    effects = torch.stack([_effect(f, label == at, decoder @ probe.weight[at]) for at in range(count)])
    clean = _accuracies(probe, measure[1], measure[2])
    falls: dict[int, Perturbation] = {}
    for size in sizes:
        if size > f.shape[1]:
            continue
        fall = torch.stack(
            [clean - _ablated(effects[at], size, measure, decoder, probe) for at in range(count)]
        )
        own = fall.diagonal()
        others = (fall.sum(1) - own) / max(count - 1, 1)
        falls[size] = Perturbation(float(own.mean()), float(others.mean()))
    return falls


def _effect(f: Tensor, inside: Tensor, along: Tensor) -> Tensor:
    difference = f[inside].mean(0) - f[~inside].mean(0)
    return difference.clamp(min=0) * along


def _ablated(
    effect: Tensor, size: int, measure: tuple[Tensor, Tensor, Tensor], decoder: Tensor, probe: LinearProbe
) -> Tensor:
    f, x, label = measure
    # As many as have any effect: the rest would be arbitrary.
    chosen = effect.topk(min(size, int((effect != 0).sum()))).indices
    return _accuracies(probe, x - f[:, chosen] @ decoder[chosen], label)


def _accuracies(probe: LinearProbe, x: Tensor, label: Tensor) -> Tensor:
    """[L] float64: each probe's accuracy, the mean of that inside its class and outside of it."""
    says = probe.scores(x) > 0
    out = []
    for at in range(says.shape[1]):
        inside = label == at
        right = says[:, at] == inside
        out.append((right[inside].double().mean() + right[~inside].double().mean()) / 2)
    return torch.stack(out)
