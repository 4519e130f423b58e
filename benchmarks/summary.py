"""From turns to figures: medians, spreads, and ratios taken within a round, on the same machine state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

__all__ = ["Spread", "Turn", "speeds", "summarise"]

BASE = "stock"


@dataclass(frozen=True)
class Turn:
    """One variant's turn in one round."""

    round: int
    variant: str
    seconds: float
    tokens: int
    steered: int

    @property
    def speed(self) -> float:
        """Output tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of a figure over the rounds."""

    median: float
    low: float
    high: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Args: values: at least one."""
        edges = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(median(values), edges[0], edges[2], min(values), max(values))


def speeds(turns: Sequence[Turn], base: str) -> dict[str, dict[str, dict[str, float]]]:
    """Variant → tokens per second, and its ratio to `base` in the same round; a `Spread` each."""
    speed = {(turn.round, turn.variant): turn.speed for turn in turns}
    found = {}
    for variant in dict.fromkeys(turn.variant for turn in turns):
        own = {number: value for (number, name), value in speed.items() if name == variant}
        ratios = [value / speed[number, base] for number, value in own.items()]
        found[variant] = {
            "tokens_per_second": asdict(Spread.of(list(own.values()))),
            "ratio": asdict(Spread.of(ratios)),
        }
    return found


def summarise(turns: Sequence[Turn], targets: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Figures of every variant.

    Args: targets: the least median ratio aimed at, by variant.
    Returns: variant → tokens per second and ratio to stock, target, and whether it is met.
    """
    return {
        variant: {**figures, **_verdict(figures["ratio"]["median"], targets.get(variant))}
        for variant, figures in speeds(turns, BASE).items()
    }


def _verdict(ratio: float, target: float | None) -> dict[str, float | bool | None]:
    return {"target": target, "met": None if target is None else ratio >= target}
