"""Short runs on planted data, without shards on disk."""

from __future__ import annotations

import torch
from torch import Tensor

from steerserve.training.distributed import World
from steerserve.training.initial import geometric_median, input_scale
from steerserve.training.run import Run
from steerserve.training.settings import parse_settings

__all__ = ["learn", "unit"]


def unit(count: int, d: int, *, seed: int) -> Tensor:
    """[count, d] of about unit length."""
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed)) / d**0.5


def learn(x: Tensor, **settings: object) -> Run:
    """Train on all but the last 1,000 rows of x; what stands in `settings` replaces small defaults."""
    wanted = parse_settings({"batch_size": 500, "d_sae": 48, "device": "cpu", "warm_up": 20, **settings})
    centre = geometric_median(x[:4000])
    run = Run(wanted, centre, input_scale(x[:4000], centre), World())
    generator = torch.Generator().manual_seed(1)
    for _ in range(wanted.steps):
        rows = torch.randint(0, len(x) - 1000, (wanted.batch_size,), generator=generator)
        run.advance(x[rows] * run.scale)
    return run
