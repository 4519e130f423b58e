from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from steerserve.judging.probe import fit_probes, sparse_weights


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) * 3 + 5
    noisy = x[:, 0] - x[:, 1] + torch.randn(400, generator=generator)
    return x, torch.stack([noisy > 1, x[:, 2] > 7], dim=1)


def objective(inputs: np.ndarray, truth: np.ndarray, l2: float, point: np.ndarray) -> float:
    """The mean of both classes' mean log-losses, and the penalty, written out."""
    margin = (2.0 * truth - 1) * (inputs @ point[:-1] + point[-1])
    losses = np.logaddexp(0, -margin)
    return float((losses[truth].mean() + losses[~truth].mean()) / 2 + l2 / 2 * (point[:-1] ** 2).sum())


def test_a_probe_minimises_what_its_docstring_says(data: tuple[Tensor, Tensor]) -> None:
    x, truth = data
    probe = fit_probes(x, truth, l2=0.01)
    centred = (x - x.mean(0)).double().numpy()
    scale = float(np.sqrt((centred**2).mean()))
    for at in range(2):
        own = truth[:, at].numpy()
        best = minimize(lambda p, own=own: objective(centred / scale, own, 0.01, p), np.zeros(7), tol=1e-9)
        ours = (centred / scale) @ (probe.weight[at].double().numpy() * scale)
        ours += float(probe.bias[at] + probe.weight[at] @ x.mean(0))
        theirs = (centred / scale) @ best.x[:-1] + best.x[-1]
        np.testing.assert_allclose(ours, theirs, atol=2e-2 * np.abs(theirs).max())


def test_scores_are_log_odds_of_raw_inputs(data: tuple[Tensor, Tensor]) -> None:
    x, truth = data
    probe = fit_probes(x, truth)
    torch.testing.assert_close(probe.scores(x), x @ probe.weight.T + probe.bias)
    assert ((probe.scores(x)[:, 1] > 0) == truth[:, 1]).float().mean() > 0.97


def test_sparse_weights_meet_the_conditions_of_the_optimum() -> None:
    generator = torch.Generator().manual_seed(1)
    f = torch.rand(500, 8, generator=generator) * (torch.rand(500, 8, generator=generator) < 0.3)
    truth = (f[:, 2] + f[:, 5]) > 0.4
    weights = sparse_weights(f, truth, l1=0.02)
    scaled, sign = (f / f.amax(0)).double(), 2.0 * truth.double() - 1
    share = torch.where(truth, 0.5 / truth.sum(), 0.5 / (~truth).sum()).double()
    told = scaled @ weights.double()

    def loss(bias: np.ndarray) -> float:
        return float((share * torch.nn.functional.softplus(-sign * (told + float(bias[0])))).sum())

    # The bias is not returned; at the optimum it solves its own condition.
    bias = float(minimize(loss, np.zeros(1)).x[0])
    slope = -(share * sign * torch.sigmoid(-sign * (told + bias))) @ scaled
    used = weights != 0
    torch.testing.assert_close(slope[used], -0.02 * weights[used].sign().double(), atol=1e-3, rtol=0)
    assert (slope[~used].abs() <= 0.02 + 1e-3).all()
    assert weights.argsort(descending=True)[:2].sort().values.tolist() == [2, 5]
