"""How well single latents stand for labelled concepts, against a linear probe, and how concepts split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import SparseActivations
from .probe import sparse_weights
from .scores import auroc, best_threshold, f1_at

__all__ = [
    "Concept",
    "Detection",
    "Half",
    "best_features",
    "detector_f1",
    "judge_concepts",
    "main_latents",
]

# A feature is first tried as a detector at these shares of its maximum; the best one gets an exact threshold.
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
# From how many of the best detectors the sparse probes choose.
CANDIDATES = 64
# A latent counts towards a concept's splitting from this F1 on.
SPLIT_F1 = 0.3
# SAEBench's: a k-sparse probe must beat the smaller one by this F1 for its latents to count.
JUMP = 0.03
MOST = 10
# Tokens of each side that sparse probes are trained on.
SPARSE_TOKENS = 4096


@dataclass(frozen=True)
class Detection:
    """A detector on held-out data: F1 at the threshold that was best on the other half, and AUROC."""

    f1: float
    auroc: float


@dataclass(frozen=True)
class Concept:
    """One label, and how it is found.

    Attributes:
        label: its name.
        feature: the latent with the best F1 on the half that chooses.
        latent, probe: that latent and a linear probe, on the held-out half, token by token.
        text_feature: the latent whose mean over a text has the best F1, on the half that chooses.
        latent_text, probe_text: that latent and a probe on whole texts: the mean of f, and of the stream.
        latents: how many latents reach an F1 of 0.3 by themselves, on the half that chooses.
        main: the latents a k-sparse probe needs (SAEBench's split features).
    """

    label: str
    feature: int
    latent: Detection
    probe: Detection
    text_feature: int
    latent_text: Detection
    probe_text: Detection
    latents: int
    main: list[int]


@dataclass(frozen=True, eq=False)
class Half:
    """One half of the data as concepts are judged on it.

    Attributes:
        activations: of n tokens. label: [n] int64.
        pooled: [T, F], mean of gain·f over each text. text_label: [T] int64.
        scores: [n, L], the token-level probe's log-odds. text_scores: [T, L], the text-level probe's.
    """

    activations: SparseActivations
    label: Tensor
    pooled: Tensor
    text_label: Tensor
    scores: Tensor
    text_scores: Tensor


def judge_concepts(choose: Half, measure: Half, labels: tuple[str, ...]) -> list[Concept]:
    """Choose a latent and a threshold for each label on one half, and measure them on the other.

    Source: single-latent probing as in SAEBench (k = 1); splitting also by Chanin et al. 2024,
        arXiv:2409.14507.
    """
    f1 = detector_f1(choose, len(labels))
    return [_judge(choose, measure, f1, at, label) for at, label in enumerate(labels)]


def detector_f1(half: Half, labels: int) -> Tensor:
    """[F, L] float64: each feature's F1 as a detector of each label at the best share of its maximum."""
    limits = half.activations.maxima()
    tried = [half.activations.detector_f1(half.label, labels, share * limits) for share in SHARES]
    return torch.stack(tried).amax(0)


def best_features(f1: Tensor, label: int, count: int) -> list[int]:
    """The features with the highest F1 for a label, best first. Args: f1: [F, L]."""
    found: list[int] = f1[:, label].topk(min(count, len(f1))).indices.tolist()
    return found


def main_latents(f: Tensor, truth: Tensor, held_f: Tensor, held_truth: Tensor) -> list[int]:
    """Which of k candidate columns stand for a concept: as many as keep raising a sparse probe's F1.

    Candidates are ranked by an L1 probe; the m best are summed up by a probe of their own, and m grows while
    its F1 on the held-out half grows by more than 0.03.

    Args: f, held_f: [n, k] and [m, k] activations. truth, held_truth: [n] and [m] bool.
    Returns: columns, best first; at least one.
    Source: SAEBench, absorption/k_sparse_probing.py, after arXiv:2409.14507, section 3.
    """
    few = _balanced_sample(truth)
    f, truth = f[few], truth[few]
    ranked = sparse_weights(f, truth).argsort(descending=True).tolist()
    kept, previous = 1, -torch.inf
    for size in range(1, min(MOST, f.shape[1]) + 1):
        columns = ranked[:size]
        weights = sparse_weights(f[:, columns], truth, l1=1e-4)
        scale = f[:, columns].amax(0).clamp(min=1e-12)
        scores, held = (part[:, columns] / scale @ weights for part in (f, held_f))
        found = f1_at(held, held_truth, best_threshold(scores, truth))
        if found <= previous + JUMP:
            break
        kept, previous = size, found
    return [int(column) for column in ranked[:kept]]


def _judge(choose: Half, measure: Half, f1: Tensor, at: int, label: str) -> Concept:
    candidates = best_features(f1, at, CANDIDATES)
    own, held = (half.activations.columns(candidates) for half in (choose, measure))
    truth, held_truth = choose.label == at, measure.label == at
    text_truth, held_text_truth = choose.text_label == at, measure.text_label == at
    feature = candidates[0]
    text_feature = _best_of_texts(choose.pooled, text_truth)
    return Concept(
        label=label,
        feature=feature,
        latent=_detection(own[:, 0], truth, held[:, 0], held_truth),
        probe=_detection(choose.scores[:, at], truth, measure.scores[:, at], held_truth),
        text_feature=text_feature,
        latent_text=_detection(
            choose.pooled[:, text_feature], text_truth, measure.pooled[:, text_feature], held_text_truth
        ),
        probe_text=_detection(
            choose.text_scores[:, at], text_truth, measure.text_scores[:, at], held_text_truth
        ),
        latents=int((f1[:, at] >= SPLIT_F1).sum()),
        main=[candidates[column] for column in main_latents(own, truth, held, held_truth)],
    )


def _balanced_sample(truth: Tensor) -> Tensor:
    """Evenly spaced tokens, at most 4,096 of those inside a concept and as many outside."""
    parts = [(truth == side).nonzero()[:, 0] for side in (True, False)]
    return torch.cat([part[:: -(-len(part) // SPARSE_TOKENS) or 1] for part in parts])


def _best_of_texts(pooled: Tensor, truth: Tensor) -> int:
    """The latent with the best F1 of those whose means differ most. Args: pooled: [T, F]. truth: [T] bool."""
    difference = _mean_difference(pooled, truth)
    tried: list[int] = difference.topk(min(CANDIDATES, len(difference))).indices.tolist()
    return max(tried, key=lambda j: f1_at(pooled[:, j], truth, best_threshold(pooled[:, j], truth)))


def _mean_difference(pooled: Tensor, truth: Tensor) -> Tensor:
    """[F]: mean inside less mean outside, in units of the feature's largest mean."""
    spread = pooled.amax(0).clamp(min=1e-12)
    return (pooled[truth].mean(0) - pooled[~truth].mean(0)) / spread


def _detection(scores: Tensor, truth: Tensor, held: Tensor, held_truth: Tensor) -> Detection:
    return Detection(f1_at(held, held_truth, best_threshold(scores, truth)), auroc(held, held_truth))
