"""The least that the op must move through memory, and how long the memory needs for it."""

from __future__ import annotations

__all__ = ["least_bytes", "least_microseconds"]

_WEIGHT_BYTES = 4


def least_bytes(*, plans: int, rows: int, width: int, tokens: int, itemsize: int) -> int:
    """Each distinct plan's encoder and decoder rows once; of each token, x's two parts read and one written.

    Args:
        plans: distinct plans in the batch, of `rows` rows each.
        tokens: steered tokens.
        itemsize: bytes of a number of the stream.
    """
    weights = plans * rows * 2 * width * _WEIGHT_BYTES
    return weights + 3 * tokens * width * itemsize


def least_microseconds(moved: int, bytes_per_second: float) -> float:
    """How long memory of that speed needs for `moved` bytes."""
    return moved / bytes_per_second * 1e6
