from __future__ import annotations

import torch
from torch import Tensor

from steerserve.judging.activations import SparseActivations
from steerserve.judging.concepts import Half, judge_concepts, main_latents


def sparse(f: Tensor) -> SparseActivations:
    places = f.nonzero()
    rows, features = places[:, 0], places[:, 1]
    return SparseActivations(rows, features, f[rows, features], torch.ones(len(f)), tuple(f.shape))


def half(seed: int) -> Half:
    """Two concepts: latent 0 is the first; latents 1 and 2 share the second; latent 3 is noise."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(400) % 2
    f = torch.zeros(400, 4)
    f[label == 0, 0] = 1 + torch.rand(200, generator=generator)
    second = (label == 1).nonzero()[:, 0]
    f[second[0::2], 1] = 1.0
    f[second[1::2], 2] = 1.0
    f[:, 3] = torch.rand(400, generator=generator) * (torch.rand(400, generator=generator) < 0.05)
    scores = torch.stack([1.0 - label, label - 0.5], dim=1)
    text = torch.arange(400) // 2 % 2
    pooled = torch.stack([f[0::2].mean(0), f[1::2].mean(0)]).repeat(5, 1)
    text_label = torch.arange(10) % 2
    text_scores = torch.stack([1.0 - text_label, 1.0 * text_label], dim=1)
    assert len(text) == 400
    return Half(sparse(f), label, pooled, text_label, scores, text_scores)


def test_a_planted_latent_is_found_and_scores_one() -> None:
    first, second = judge_concepts(half(0), half(1), ("first", "second"))
    assert (first.feature, first.latent.f1, first.latent.auroc) == (0, 1.0, 1.0)
    assert (first.probe.f1, first.latent_text.f1, first.probe_text.f1) == (1.0, 1.0, 1.0)
    assert (first.main, first.latents) == ([0], 1)
    # Each of the two halves finds half of the concept: precision 1, recall ½.
    assert second.latent.f1 == 2 / 3
    assert sorted(second.main) == [1, 2]
    assert second.latents == 2


def test_one_latent_is_enough_where_others_add_nothing() -> None:
    data, held = half(2), half(3)
    columns, others = data.activations.columns([3, 0]), held.activations.columns([3, 0])
    assert main_latents(columns, data.label == 0, others, held.label == 0) == [1]
