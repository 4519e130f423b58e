from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steerserve.training.evaluate import DetectorCounts, evaluate


class Halves:
    """Reconstructs the first coordinate alone; its second feature never fires."""

    d_in, d_sae = 2, 2

    def autoencode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros(len(x))
        return torch.stack([x[:, 0].relu(), nothing], 1), torch.stack([x[:, 0].relu(), nothing], 1)


def test_metrics_follow_their_formulas() -> None:
    x = torch.tensor([[1.0, 3.0], [2.0, 1.0], [0.0, 2.0], [5.0, 2.0]])
    found = evaluate(Halves(), [x[:3], x[3:]])
    errors, squares = 9 + 1 + 4 + 4, 10 + 5 + 4 + 29
    spread = squares - 4 * (2.0**2 + 2.0**2)
    assert found.explained_variance == pytest.approx(1 - errors / spread)
    assert found.r2 == pytest.approx(1 - errors / squares)
    assert (found.l0, found.dead_fraction, found.tokens) == (0.75, 0.5, 4)
    assert found.max_activation.tolist() == [5.0, 0.0]
    assert found.firing_rate.tolist() == [0.75, 0.0]


def test_a_large_mean_does_not_hide_in_the_explained_variance() -> None:
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) + 100
    found = evaluate(Halves(), [x])
    assert found.explained_variance < 0 < found.r2


class Signed(Halves):
    """Its second feature is negative wherever it fires, as one of VAEase may be."""

    def autoencode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = torch.stack([x[:, 0], x[:, 1].clamp(max=0)], 1)
        return f, f


def test_a_negative_activation_is_one() -> None:
    found = evaluate(Signed(), [torch.tensor([[1.0, -3.0], [2.0, 1.0], [-4.0, -2.0]])])
    assert found.firing_rate.tolist() == pytest.approx([1.0, 2 / 3])
    assert found.max_activation.tolist() == [2.0, 0.0]


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        evaluate(Halves(), [])


def test_a_feature_is_scored_as_a_detector() -> None:
    f = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 0.0], [0.5, 0.0]])
    truth = torch.tensor([[True, False], [True, False], [True, False], [False, False]])
    counts = DetectorCounts(2, 2)
    counts.update(f[:1], truth[:1])
    counts.update(f[1:], truth[1:])
    precision, recall, f1 = counts.scores()
    torch.testing.assert_close(precision, torch.tensor([[2 / 3, 0.0], [1.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(recall, torch.tensor([[2 / 3, 0.0], [1 / 3, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(f1, torch.tensor([[2 / 3, 0.0], [0.5, 0.0]], dtype=torch.float64))
