"""Atoms for image-shaped activations: bars of a hue, which are rank-1, and diagonals, which are not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["bars", "diagonals"]

_HUES = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1))
# Atoms more alike than this are not both planted: no SAE with an L1 price would tell them apart.
_MOST_ALIKE = 0.6
_DRAWS = 10_000


def bars(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`count` filled rectangles of one hue, 2 to 5 pixels a side: each a colour⊗rows⊗columns of unit norm.

    Args: size: pixels along a side. Returns: [count, 3, size, size].
    Raises: ValueError if so many that differ do not fit.
    """

    def mask() -> Tensor:
        rows, columns = _interval(size, generator), _interval(size, generator)
        return rows.unsqueeze(1) * columns

    return _different(count, mask, generator)


def diagonals(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`count` strokes of one hue, 5 pixels long, along either diagonal: rank 5 over (height, width).

    No rank-1 tensor has a cosine above 1/√5 = 0.447 with one of them.

    Args: size: pixels along a side. Returns: [count, 3, size, size], unit norm.
    Raises: ValueError if so many that differ do not fit.
    """

    def mask() -> Tensor:
        top, left = (_integer(0, size - 5, generator) for _ in range(2))
        stroke = torch.eye(5) if _integer(0, 1, generator) else torch.eye(5).flip(0)
        canvas = torch.zeros(size, size)
        canvas[top : top + 5, left : left + 5] = stroke
        return canvas

    return _different(count, mask, generator)


def _different(count: int, mask: Callable[[], Tensor], generator: torch.Generator) -> Tensor:
    """Coloured masks of unit norm [count, 3, size, size], no two of them too much alike."""
    kept: list[Tensor] = []
    for _ in range(_DRAWS):
        hue = torch.tensor(_HUES[_integer(0, len(_HUES) - 1, generator)], dtype=torch.float32)
        atom = hue.view(3, 1, 1) * mask()
        atom = atom / atom.norm()
        if all(torch.sum(atom * other) <= _MOST_ALIKE for other in kept):
            kept.append(atom)
        if len(kept) == count:
            return torch.stack(kept)
    raise ValueError(f"expected room for {count} different atoms, found {len(kept)}")


def _interval(size: int, generator: torch.Generator) -> Tensor:
    length = _integer(2, 5, generator)
    start = _integer(0, size - length, generator)
    line = torch.zeros(size)
    line[start : start + length] = 1
    return line


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """From low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
