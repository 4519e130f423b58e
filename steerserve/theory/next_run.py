"""Which run to do next: the width and the tokens that a law says are the best use of more computing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .law import Law, Point

__all__ = ["Proposal", "flops", "propose"]

_WIDTHS_PER_DOUBLING = 2
# A law is trusted this far beyond the widths and the tokens that it was fitted on.
_REACH = 8.0


@dataclass(frozen=True)
class Proposal:
    """A run that was not made yet. Attributes:
    k, width, tokens: what to set. loss: predicted. flops: what it costs.
    best_loss: the least that was measured at this k. factor: the cost over the dearest run's so far.
    """

    k: int
    width: int
    tokens: int
    loss: float
    flops: float
    best_loss: float
    factor: float


def flops(k: Any, width: Any, tokens: Any, d_in: int) -> Any:
    """Multiplications and additions of a sparse training run.

    Per token the encoder's product costs 2·d·n; decoding, the errors' way back and the two weight gradients
    touch k features each: 8·k·d. Args: numbers or arrays.
    """
    return tokens * (2.0 * d_in * width + 8.0 * k * d_in)


def propose(law: Law, points: Sequence[Point], d_in: int, budget: float = 4.0) -> list[Proposal]:
    """For each k that was tried, the best run within `budget` times the cost of the dearest one so far.

    Widths and tokens may go up to eight times beyond those that the law was fitted on, no further.
    """
    dearest = max(flops(p.k, p.width, p.tokens, d_in) for p in points)
    widths = [p.width for p in points]
    doublings = np.log2(_REACH * max(widths) / min(widths))
    grid = min(widths) * 2 ** (np.arange(int(doublings * _WIDTHS_PER_DOUBLING) + 1) / _WIDTHS_PER_DOUBLING)
    most_tokens = _REACH * max(p.tokens for p in points)
    found = []
    for k in sorted({p.k for p in points}):
        wide = grid[grid >= k]
        tokens = np.minimum(budget * dearest / flops(k, wide, 1.0, d_in), most_tokens)
        losses = law.predict(k, wide, tokens)
        best = int(np.argmin(losses))
        cost = flops(k, wide[best], tokens[best], d_in)
        measured = min(p.loss for p in points if p.k == k)
        found.append(
            Proposal(
                int(k),
                round(wide[best]),
                int(tokens[best]),
                float(losses[best]),
                cost,
                measured,
                cost / dearest,
            )
        )
    return found
