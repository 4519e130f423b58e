"""How the rows of a plan lie in a token's mask, and in a slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .row import Row
from .window import Window

__all__ = ["MAX_BITS", "Bits", "reading_places"]

# A token's mask of windows has 64 bits.
MAX_BITS = 64


@dataclass(frozen=True)
class Bits:
    """Which bit of a token's mask says what of each row.

    `windows` [B]: bit b of a token's mask is set where `windows[b]` includes it. `row` [R]: the bit under
    which each row is listed. `condition` [R]: the bit that is cleared on the way where a gate at an earlier
    hook point does not hold; the same as `row`, but for rows that stay once they are latched.
    """

    windows: tuple[Window, ...]
    row: tuple[int, ...]
    condition: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Bits:
        """Rows of one window share a bit, unless an earlier hook point has a say in it."""
        windows: list[Window] = []
        shared: dict[Window, int] = {}

        def own(window: Window) -> int:
            windows.append(window)
            return len(windows) - 1

        # Most rows have the same window, and asking which object it is takes less time than a hash.
        last: Window | None = None
        last_bit = 0

        def listed(row: Row) -> int:
            nonlocal last, last_bit
            if row.window is not last:
                if row.window not in shared:
                    shared[row.window] = own(row.window)
                last, last_bit = row.window, shared[row.window]
            return last_bit

        conditions = [own(row.window) if row.earlier else listed(row) for row in rows]
        under = [listed(row) if row.latch else bit for row, bit in zip(rows, conditions, strict=True)]
        return cls(tuple(windows), tuple(under), tuple(conditions))


def reading_places(rows: Sequence[Row]) -> dict[int, list[tuple[str, int]]]:
    """What a slot holds at each hook point, as (source, feature) in order.

    Every row; every question that a row at a later hook point asks there; features that only conditions read.
    """
    points = sorted({row.point for row in rows} | {gate.point for row in rows for gate in row.gates})
    return {point: _places(rows, point) for point in points}


def _places(rows: Sequence[Row], point: int) -> list[tuple[str, int]]:
    own = [(row.source, row.feature) for row in rows if row.point == point]
    asked = [[gate for gate in row.earlier if gate.point == point] for row in rows]
    own += [(gates[0].source, gates[0].feature) for gates in asked if gates]
    gates = [(g.source, g.feature) for row in rows for g in row.gates if g.point == point]
    return own + [place for place in dict.fromkeys(gates) if place not in set(own)]
