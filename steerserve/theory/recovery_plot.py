"""The plot of dictionary recovery: scores, how well each feature was found, loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerserve.experiments.style import new_figure

from .recovery import Recovered

__all__ = ["draw"]

_SCORES = {"mmcs": "MMCS", "mcc": "MCC", "explained_variance": "explained variance"}
_COLOURS = ("#0b5394", "#6fa8dc", "#e69138")


def draw(found: Sequence[Recovered], path: Path) -> None:
    """Write the plot as a PNG."""
    figure = new_figure(13, 4.2)
    scores, cosines, losses = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    _scores(scores, found)
    for run in found:
        best = run.best.sort(descending=True).values
        cosines.plot(range(1, len(best) + 1), best, label=run.architecture, linewidth=1.5)
        steps, values = zip(*run.losses, strict=True)
        losses.plot(steps, values, label=run.architecture, linewidth=1.2)
    cosines.set(
        xlabel="planted feature, best found first", ylabel="best cosine with a latent", ylim=(0, 1.03)
    )
    cosines.set_title("How well each feature was found", fontsize=10)
    losses.set(xlabel="step", ylabel="training loss (each its own)", yscale="log")
    losses.set_title("Loss", fontsize=10)
    cosines.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def _scores(axis: Any, found: Sequence[Recovered]) -> None:
    width = 0.27
    for number, (name, label) in enumerate(_SCORES.items()):
        values = [getattr(run, name) for run in found]
        places = [i + (number - 1) * width for i in range(len(found))]
        bars = axis.bar(places, values, width * 0.94, label=label, color=_COLOURS[number])
        axis.bar_label(bars, fmt="%.3f", fontsize=6, rotation=90, padding=2)
    least = min(getattr(run, name) for run in found for name in _SCORES)
    axis.set_xticks(range(len(found)), [f"{run.architecture}\nL0 {run.l0:.1f}" for run in found], fontsize=8)
    axis.set_ylim(max(0.0, least - 0.1), 1.09)
    axis.set_title("Recovery of the planted dictionary", fontsize=10)
    axis.legend(fontsize=7, loc="upper left", ncols=3)
