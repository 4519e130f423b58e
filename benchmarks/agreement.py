"""How far two sides answered the same requests with the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

__all__ = ["agreement"]


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> dict[str, float]:
    """Of answers of equal lengths: the share that is the same as a whole, and the share of tokens that stand
    before the first difference of their answer (behind it, both went on from different texts).
    """
    common = [_common(a, b) for a, b in zip(ours, theirs, strict=True)]
    lengths = [len(answer) for answer in ours]
    whole = sum(same == length for same, length in zip(common, lengths, strict=True))
    return {"answers": whole / len(lengths), "tokens": sum(common) / sum(lengths)}


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=True)))
