"""The plot of the toy models: W·Wᵀ by density, dimensions per feature, the phase change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from steerserve.experiments.style import new_figure

from .densities import Superposition
from .phase import PHASES, PhaseDiagram
from .superposition import ToyModels

__all__ = ["draw"]

_COLOURS = ("#f3f3f3", "#3d85c6", "#cc4125")
# Shares of a dimension that regular solids give, which features gather at.
_SOLIDS = {
    1: "a dimension of its own",
    3 / 4: "tetrahedron 3/4",
    2 / 3: "triangle 2/3",
    1 / 2: "pair 1/2",
    2 / 5: "pentagon 2/5",
    3 / 8: "antiprism 3/8",
}


def draw(result: Superposition, path: Path) -> None:
    """Write the plot as a PNG."""
    figure = new_figure(13, 9.2)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    _pictures(top, result.pictured)
    axes = bottom.subplots(1, 3, width_ratios=(1.7, 1, 1))
    _geometry(axes[0], result.geometry)
    _phases(axes[1], result.phases, result.phases.found, "Phase change: trained")
    _phases(axes[2], result.phases, result.phases.expected, "Solution with the least loss")
    figure.savefig(path, dpi=130)


def _pictures(panel: Any, models: ToyModels) -> None:
    """Above, W·Wᵀ of each model; below, how long each feature is, red by what it shares."""
    n, m = models.weight.shape[1:]
    panel.suptitle(
        f"{n} features of falling importance in {m} dimensions: W·Wᵀ, and ‖W_i‖ coloured by interference",
        fontsize=10,
    )
    axes = panel.subplots(2, len(models.density), height_ratios=(2.3, 1))
    for number, (above, below) in enumerate(axes.T):
        above.imshow(models.gram[number], cmap="RdBu", vmin=-1.2, vmax=1.2)
        above.set(xticks=[], yticks=[], title=f"density {models.density[number]:.3g}")
        norms, shared = models.norms[number], models.interference[number]
        colours = [(min(1.0, float(s)), 0.15, 1 - min(1.0, float(s))) for s in shared]
        below.bar(range(n), norms, color=colours)
        below.set(ylim=(0, 1.4), xticks=[], xlabel="feature, by importance")
    axes[1, 0].set_ylabel("‖W_i‖")


def _geometry(axis: Any, models: ToyModels) -> None:
    sparsity = 1 / models.density
    for number, inverse in enumerate(sparsity):
        kept = models.dimensions[number][models.norms[number] > 0.5]
        jitter = 1 + 0.06 * (torch.rand(len(kept), generator=torch.Generator().manual_seed(number)) - 0.5)
        axis.scatter(inverse * jitter, kept, s=7, alpha=0.35, color="#888888", linewidths=0)
    axis.plot(sparsity, models.dimensions_per_feature, "o-", color="#0b5394", label="D* = m / ‖W‖²")
    for height, name in _SOLIDS.items():
        axis.axhline(height, color="#bbbbbb", linewidth=0.7, zorder=0)
        axis.text(float(sparsity[-1]) * 1.12, height, name, fontsize=6, va="center", color="#666666")
    n, m = models.weight.shape[1:]
    axis.set(xscale="log", xlim=(0.9, float(sparsity[-1]) * 6), ylim=(0, 1.1), xlabel="1 / density")
    axis.set(ylabel="dimensions per feature", title=f"Geometry: {n} features in {m} dimensions")
    axis.legend(fontsize=8, loc="lower left")


def _phases(axis: Any, diagram: PhaseDiagram, phase: torch.Tensor, title: str) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    axis.pcolormesh(
        1 / diagram.density, diagram.importance, phase, cmap=ListedColormap(_COLOURS), vmin=0, vmax=2,
        edgecolors="white", linewidth=0.4, shading="nearest",
    )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="1 / density", ylabel="importance of the extra feature")
    axis.set_title(title, fontsize=10)
    handles = [
        Patch(facecolor=c, edgecolor="#999999", label=n) for c, n in zip(_COLOURS, PHASES, strict=True)
    ]
    axis.legend(handles=handles, fontsize=7, loc="lower left")
