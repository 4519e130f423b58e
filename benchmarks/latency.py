"""Turns in which requests came over time: how long each waited for its last token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from .arrivals import Arrival
from .summary import Spread, Turn, speeds

__all__ = ["TimedTurn", "summarise_timed"]


@dataclass(frozen=True)
class TimedTurn(Turn):
    """`latencies` are seconds from each request's arrival to its whole answer; in `idle`, none was there."""

    latencies: tuple[float, ...]
    idle: float

    @classmethod
    def of(
        cls, number: int, variant: str, arrivals: Sequence[Arrival], result: Mapping[str, Any]
    ) -> TimedTurn:
        """A turn from what the process answered."""
        finished = result["finished"]
        latencies = tuple(end - one["at"] for end, one in zip(finished, arrivals, strict=True))
        tokens = sum(map(len, result["replies"]))
        return cls(
            number, variant, max(finished), tokens, result.get("steered", 0), latencies, result["idle"]
        )


def summarise_timed(turns: Sequence[TimedTurn], base: str) -> dict[str, dict[str, Any]]:
    """Variant → a `Spread` over the rounds of each figure; the speed's ratio is to `base`."""
    figures: dict[str, dict[str, Any]] = {}
    for variant, found in speeds(turns, base).items():
        own = [turn for turn in turns if turn.variant == variant]
        columns = {
            "seconds": [turn.seconds for turn in own],
            "idle_seconds": [turn.idle for turn in own],
            "median_latency": [median(turn.latencies) for turn in own],
            "p95_latency": [_p95(turn.latencies) for turn in own],
        }
        figures[variant] = {**found, **{name: asdict(Spread.of(values)) for name, values in columns.items()}}
    return figures


def _p95(values: Sequence[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1]
