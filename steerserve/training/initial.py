"""Where training starts: the input's centre, which becomes b_dec, and its scale."""

from __future__ import annotations

from torch import Tensor

__all__ = ["geometric_median", "input_scale"]


def geometric_median(x: Tensor, iterations: int = 100) -> Tensor:
    """The point with the least sum of distances to the rows of x, which outlier tokens do not move.

    Args: x: [n, d]. iterations: the most that are made; they stop when the point moves by less than 1e-6.
    Returns: [d] float32.
    Source: Weiszfeld 1937.
    """
    points = x.double()
    median = points.mean(0)
    for _ in range(iterations):
        weights = 1 / (points - median).norm(dim=1).clamp(min=1e-9)
        moved = weights @ points / weights.sum()
        step, median = (moved - median).norm(), moved
        if step <= 1e-6 * median.norm():
            break
    return median.float()


def input_scale(x: Tensor, centre: Tensor) -> float:
    """The factor that makes the mean squared distance to `centre` 1, so that no setting depends on the model.

    Args: x: [n, d], centre: [d]. Returns: a positive number; 1.0 for rows that are all alike.
    """
    spread = float((x.double() - centre.double()).square().sum(-1).mean())
    return spread**-0.5 if spread > 0 else 1.0
