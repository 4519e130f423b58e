"""How long a training step takes as the dictionary grows: a picture of `benchmarks.training`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot"]

_LOOKS = {"ours": ("#1f5fbf", "o"), "saelens": ("#c0392b", "s"), "sparsify": ("#7f8c8d", "^")}


def plot(cases: Sequence[dict[str, Any]], out: Path) -> None:
    """Milliseconds against the number of features, a panel for each architecture. Args: out: an .svg file."""
    from matplotlib.figure import Figure

    growing = cases[2:]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, name in zip(panels, ("topk", "batchtopk"), strict=True):
        for side, (colour, marker) in _LOOKS.items():
            points = [
                (case["features"], case["sides"][f"{side}/{name}"]["milliseconds"]["median"])
                for case in growing
                if f"{side}/{name}" in case["sides"]
            ]
            if points:
                panel.plot(*zip(*points, strict=True), color=colour, marker=marker, label=side)
        panel.set(xscale="log", yscale="log", title=name, xlabel="features F")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("one training step, ms")
    figure.savefig(out)
