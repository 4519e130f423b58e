"""Where training starts: the input's scale, the geometric median as b_dec, tied random rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .batchtopk import Parameters

__all__ = ["geometric_median", "initial_parameters", "input_scale"]


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


def initial_parameters(d_sae: int, b_dec: Tensor, seed: int) -> Parameters:
    """Random unit decoder rows with the encoder tied to them at the start.

    Args: b_dec: [d], in the units of the normalised input.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(d_sae, b_dec.shape[0], generator=generator)
    decoder = torch.nn.functional.normalize(decoder, dim=-1)
    return Parameters(decoder.clone(), torch.zeros(d_sae), decoder, b_dec.clone())
