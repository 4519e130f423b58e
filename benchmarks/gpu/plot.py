"""The decode loop's overheads as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .loop import VARIANTS

__all__ = ["plot"]


def plot(loop: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Overhead over the unhooked loop, per batch and variant, one panel for each number of hooked layers.

    Args: loop: what `loop.measure` returned for each batch.
    Raises: ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    hooked = sorted({v["hooked_layers"] for v in loop[0]["variants"]} - {0})
    figure, panels = pyplot.subplots(1, len(hooked), figsize=(6 * len(hooked), 4), squeeze=False)
    for panel, layers in zip(panels[0], hooked, strict=True):
        for i, variant in enumerate(VARIANTS):
            ratios = [_ratio(one, variant, layers) for one in loop]
            places = [at + (i - 1) * 0.27 for at in range(len(loop))]
            bars = panel.bar(places, [100 * (ratio - 1) for ratio in ratios], 0.25, label=variant)
            panel.bar_label(bars, fmt="%.1f", fontsize=7)
        panel.set_xticks(range(len(loop)), [str(one["batch"]) for one in loop])
        panel.set_title(f"{layers} hooked layer{'s' if layers > 1 else ''}")
        panel.set_xlabel("batch")
        panel.set_ylabel("longer than the unhooked step (%)")
        panel.axhline(0, color="black", linewidth=0.8)
    panels[0][0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _ratio(one: dict[str, Any], variant: str, layers: int) -> float:
    found = (v for v in one["variants"] if (v["variant"], v["hooked_layers"]) == (variant, layers))
    return float(next(found)["ratio"]["median"])
