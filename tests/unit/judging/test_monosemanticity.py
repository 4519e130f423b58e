from __future__ import annotations

import math

import pytest
import torch

from steerserve.judging.monosemanticity import monosemanticity


def test_the_score_is_the_papers_double_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(12, 5, generator=generator)
    e = torch.randn(12, 7, generator=generator)
    similarity = torch.nn.functional.cosine_similarity(e[:, None], e[None], dim=-1)
    found = monosemanticity(a, e)
    for k in range(5):
        scaled = (a[:, k] - a[:, k].min()) / (a[:, k].max() - a[:, k].min())
        top = bottom = 0.0
        for n in range(12):
            for m in range(n + 1, 12):
                relevance = float(scaled[n] * scaled[m])
                top, bottom = top + relevance * float(similarity[n, m]), bottom + relevance
        assert float(found[k]) == pytest.approx(top / bottom, abs=1e-5)


def test_a_feature_of_like_texts_scores_one_and_of_unlike_ones_none() -> None:
    embeddings = torch.eye(2)[[0, 0, 1, 1]]
    activations = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert monosemanticity(activations, embeddings).tolist() == pytest.approx([1.0, 0.0])


def test_features_that_fire_on_one_text_or_on_all_alike_have_no_score() -> None:
    activations = torch.tensor([[0.0, 2.0, 0.0], [0.0, 2.0, 3.0], [0.0, 2.0, 0.0]])
    assert all(math.isnan(score) for score in monosemanticity(activations, torch.eye(3)).tolist())
