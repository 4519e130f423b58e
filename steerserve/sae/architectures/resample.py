"""Resampling: dead features begin anew, at what the living ones miss.

    d_j ← r / ‖r‖ for an error r = x − x̂ drawn with probability ∝ ‖r‖⁴;  w_j ∝ d_j, biases 0, Adam forgets

Source: Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron Resampling". There the rows point
along x itself, most of which the living features explain already; here along the error.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from .base import Architecture, Options
from .linear import LinearEncoder

__all__ = ["ResampleOptions", "ResampledEncoder", "missed_directions"]

_TIMES = 60
_UNTIL = 0.75
# Errors of outliers all point one way and are drawn first: features that began there together would add up to
# many times what is missed. Directions of a larger cosine count as one.
_ALIKE = 0.5


class ResampleOptions(Options):
    """Settings of an architecture whose dead features get no gradient of their own."""

    resample_every: Annotated[
        int | None,
        Field(
            ge=0,
            description="standard, gated, jumprelu: steps between two restarts of the dead features, in the "
            "first three quarters of the run; 0 for never, a sixtieth of the run if not given.",
        ),
    ] = None

    def resamples_after(self, done: int, steps: int) -> bool:
        """Whether dead features begin anew once `done` of `steps` steps are made."""
        every = max(1, steps // _TIMES) if self.resample_every is None else self.resample_every
        return every > 0 and done % every == 0 and done <= _UNTIL * steps


class ResampledEncoder(LinearEncoder):
    """A linear encoder whose dead features begin anew; its options are `ResampleOptions`.

    Attributes: restarted: the length of new encoder rows against the others' mean; Bricken et al.'s.
    """

    restarted: ClassVar[float] = 0.2

    def resample(self, where: Tensor, directions: Tensor) -> None:
        """Let features begin anew. Args: where: [n] int64, not all of them. directions: [n, d], unit rows."""
        p = self.parameters
        others = torch.ones(self.d_sae, dtype=torch.bool, device=where.device).index_fill_(0, where, False)
        for name, size in (("decoder", 1.0), ("encoder", self.restarted)):
            p[name][where] = directions * (size * p[name][others].norm(dim=-1).mean())
        p["bias"][where] = 0.0


def missed_directions(sae: Architecture, x: Tensor, count: int, seed: int) -> Tensor:
    """Unit directions of what the SAE misses, no two of them alike.

    Args: x: [B, d], normalised. count: how many, at most B.
    Returns: [count, d]; the last rows are zero, where not as many unlike directions were found.
    """
    error = x - sae.autoencode(x)[1]
    weights = error.square().sum(dim=1).square().double().cpu()
    drawn = torch.multinomial(
        weights + torch.finfo(torch.float64).tiny,
        len(x),
        generator=torch.Generator().manual_seed(seed),
    )
    unit = torch.nn.functional.normalize(error[drawn.to(x.device)], dim=-1)
    found = unit[_unlike(unit, count)]
    return torch.nn.functional.pad(found, (0, 0, 0, count - len(found)))


def _unlike(unit: Tensor, count: int) -> Tensor:
    """The first rows that have no like one among those taken before, at most `count`. Args: unit: [n, d]."""
    alike = (unit @ unit.T > _ALIKE).cpu()
    free = torch.ones(len(unit), dtype=torch.bool)
    taken: list[int] = []
    for row in range(len(unit)):
        if len(taken) == count:
            break
        if free[row]:
            taken.append(row)
            free &= ~alike[row]
    return torch.tensor(taken, dtype=torch.int64, device=unit.device)
