from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from torch import Tensor

from steerserve.judging.scores import auroc, best_threshold, f1_at

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40)


def columns(pairs: list[tuple[int, bool]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([float(score) for score, _ in pairs]), torch.tensor([true for _, true in pairs])


@given(PAIRS)
def test_the_area_is_mann_and_whitneys_statistic_with_ties_counted_half(
    pairs: list[tuple[int, bool]],
) -> None:
    scores, truth = columns(pairs)
    positives, negatives = scores[truth], scores[~truth]
    if len(positives) and len(negatives):
        u = mannwhitneyu(positives.numpy(), negatives.numpy()).statistic
        assert auroc(scores, truth) == pytest.approx(u / (len(positives) * len(negatives)))
    else:
        assert auroc(scores, truth) == 0.5


@given(PAIRS)
def test_no_threshold_beats_the_best_one(pairs: list[tuple[int, bool]]) -> None:
    scores, truth = columns(pairs)
    tried = [f1_at(scores, truth, cut) for cut in torch.arange(-1, 7.5, 0.5).tolist()]
    assert f1_at(scores, truth, best_threshold(scores, truth)) == pytest.approx(max(tried))


def test_f1_counts_what_is_said_and_what_is_true() -> None:
    scores, truth = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([True, False, True, True])
    assert f1_at(scores, truth, 1.5) == pytest.approx(2 * 1 / (2 + 3))
    assert f1_at(scores, torch.zeros(4, dtype=torch.bool), 9.0) == 0.0
