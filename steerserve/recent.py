"""The last tokens of each live request, one by one, so that those its client never received can be left out.

The engine runs ahead of the front end, which ends a request at a stop string, or when its client leaves: by
then the request has been computed on. A sum cannot be taken back from a total, and a maximum not at all; so
a token joins the totals only when another takes its place here, `WINDOW` positions later, or when the request
has ended and it is known where.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["WINDOW", "Recent"]

# How many tokens the engine may run past a request's end before its counts are inexact, which its report
# says. A power of two, for a kernel divides by it.
WINDOW = 64


@dataclass(frozen=True)
class Recent:
    """The last tokens by request and row of its plan.

    The token at position p lies in cell p mod `WINDOW`.

    Attributes:
        at: [..., WINDOW] int32, the position of each cell's token, −1 for none.
        values: [..., WINDOW, 2] float32, its f before and f' after; anything where there is no token.
    """

    at: Tensor
    values: Tensor

    @classmethod
    def blank(cls, *shape: int, device: torch.device | str = "cpu") -> Recent:
        """Without tokens. Args: shape: what comes before the cells."""
        at = torch.full((*shape, WINDOW), -1, dtype=torch.int32, device=device)
        return cls(at, torch.empty(*shape, WINDOW, 2, dtype=torch.float32, device=device))

    def clear(self, number: int) -> None:
        """Forget the tokens of one request."""
        self.at[number].fill_(-1)

    def grown(self) -> Recent:
        """Twice as many requests; the new ones have no tokens."""
        more = torch.full_like(self.at, -1)
        return Recent(torch.cat([self.at, more]), torch.cat([self.values, torch.empty_like(self.values)]))

    def of(self, number: int, rows: int) -> Recent:
        """A copy of one request's first rows."""
        return Recent(self.at[number, :rows].clone(), self.values[number, :rows].clone())

    def add_to(self, table: NDArray[np.float64], end: int) -> bool:
        """Add the tokens below position `end` to a table in host memory; these are too.

        Args: table: [rows, 7], as `Tally.table`.
        Returns: whether no token at `end` or behind it can be in the table.
        """
        return bool(_add(table, self.at.numpy(), self.values.numpy(), end))


@numba.njit("b1(float64[:, ::1], int32[:, ::1], float32[:, :, ::1], int64)", nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _add(table: Any, at: Any, values: Any, end: Any) -> Any:
    exact = True
    for row in range(at.shape[0]):
        for cell in range(at.shape[1]):
            # One that took the place of a token which does not count either.
            exact &= at[row, cell] < end + WINDOW
            if 0 <= at[row, cell] < end:
                before, after = values[row, cell, 0], values[row, cell, 1]
                table[row, 0] += 1
                table[row, 1] += before
                table[row, 2] = max(table[row, 2], before)
                table[row, 3] += after
                table[row, 4] = max(table[row, 4], after)
                table[row, 5] += before > 0
                table[row, 6] += after < before
    return exact
