"""What rows remember of a request: from which position on they are latched, or where they ended it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NEVER", "History"]

NEVER = 2**62


@dataclass(frozen=True)
class History:
    """The tokens' place in their requests, and what was noted of each request.

    A request's notes are a function of its tokens that stand: those at positions that a step computes anew
    (after a preemption, or in place of rejected drafts) are taken back before it, so nothing depends on how
    the scheduler cut the request. Notes behind a request's last token are of drafts that were rejected.

    Attributes:
        table: [tokens] int32, each token's request, −1 for none.
        position: [tokens] int64, its position there.
        since: [M, R] int64; for each request and row of its plan the first position at which the row's
            conditions held (rows that latch or abort), or at which it could not be held; `NEVER` until then.
    """

    table: Tensor
    position: Tensor
    since: Tensor

    @classmethod
    def blank(cls, tokens: int, device: torch.device | str = "cpu") -> History:
        """Of tokens whose requests nothing is noted of."""
        table = torch.full((tokens,), -1, dtype=torch.int32, device=device)
        position = torch.zeros(tokens, dtype=torch.int64, device=device)
        return cls(table, position, torch.full((1, 128), NEVER, dtype=torch.int64, device=device))
