"""Linear probes: logistic regression on the residual stream, dense, and sparse over an SAE's latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["LinearProbe", "fit_probes", "sparse_weights"]

_STEPS = 100
_L1_STEPS = 200


@dataclass(frozen=True)
class LinearProbe:
    """One logistic regression for each of L labels.

    Attributes:
        weight: [L, d] float32, in the scale of its inputs.
        bias: [L] float32.
    """

    weight: Tensor
    bias: Tensor

    def scores(self, x: Tensor) -> Tensor:
        """Log-odds [n, L]. Args: x: [n, d]."""
        return x.float() @ self.weight.T + self.bias


def fit_probes(x: Tensor, truth: Tensor, *, l2: float = 1e-3) -> LinearProbe:
    """Minimise, for each label, the mean log-loss with both classes weighing the same, plus l2/2·‖w‖².

    The inputs are centred and divided by one number, their root mean square, so that `l2` means the same in
    any model and the directions of the stream keep their proportions.

    Args: x: [n, d]. truth: [n, L] bool.
    """
    mean = x.float().mean(0)
    scale = (x.float() - mean).square().mean().sqrt().clamp(min=1e-12)
    inputs = (x.float() - mean) / scale
    signs, weights = _balanced(truth)
    weight = torch.zeros(truth.shape[1], x.shape[1], requires_grad=True)
    bias = torch.zeros(truth.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_STEPS, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses = (softplus(-signs * (inputs @ weight.T + bias)) * weights).sum()
        total = losses + l2 / 2 * weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    raw = weight.detach() / scale
    return LinearProbe(raw, bias.detach() - raw @ mean)


@torch.no_grad()
def sparse_weights(f: Tensor, truth: Tensor, *, l1: float = 0.01) -> Tensor:
    """Weights of a logistic regression with an L1 penalty, which leaves most of them at zero.

    Args: f: [n, k] activations; each column is divided by its own maximum first. truth: [n] bool.
    Returns: [k] float32, for the scaled columns.
    Source: FISTA, Beck and Teboulle 2009; the penalty as in SAEBench's k-sparse probing.
    """
    scaled = f / f.amax(0).clamp(min=1e-12)
    inputs = torch.cat([scaled, torch.ones(len(f), 1)], dim=1)
    signs, weights = _balanced(truth.unsqueeze(1))
    signs, weights = signs[:, 0], weights[:, 0]
    # The logistic's curvature is at most 1/4.
    step = 4 / torch.linalg.eigvalsh(inputs.T @ (inputs * weights.unsqueeze(1)))[-1]
    penalty = torch.full((inputs.shape[1],), l1)
    penalty[-1] = 0
    point = previous = torch.zeros(inputs.shape[1])
    momentum = 1.0
    for _ in range(_L1_STEPS):
        slope = -(weights * signs * torch.sigmoid(-signs * (inputs @ point))) @ inputs
        moved = point - step * slope
        current = moved.sign() * (moved.abs() - step * penalty).clamp(min=0)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        point = current + (momentum - 1) / following * (current - previous)
        previous, momentum = current, following
    return previous[:-1]


def _balanced(truth: Tensor) -> tuple[Tensor, Tensor]:
    """Signs ±1 and weights, [n, L] each; the positives' weights sum to ½, and so do the negatives'."""
    true = truth.float()
    positives = true.sum(0).clamp(min=1)
    negatives = (len(truth) - true.sum(0)).clamp(min=1)
    return 2 * true - 1, torch.where(truth, 0.5 / positives, 0.5 / negatives)
