"""The plot of the experiment on images: atoms, loss curves, and how many images are enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .style import COLOURS, new_figure, smoothed
from .tensor import IMAGES, TensorResult

__all__ = ["draw"]

_SHOWN = 8


def draw(result: TensorResult, path: Path) -> None:
    """Write the plot as a PNG."""
    figure = new_figure(13, 7.6)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    for panel, data in zip(top.subfigures(1, 2), result.planted, strict=True):
        _atoms(panel, result, data)
    loss, found = bottom.subplots(1, 2)
    _losses(loss, result)
    _images(found, result)
    figure.savefig(path, dpi=130)


def _atoms(panel: Any, result: TensorResult, data: str) -> None:
    """Rows: planted, then each SAE's atom most like it; columns: the first atoms."""
    rank = "rank 1" if data == "bars" else "rank 5"
    panel.suptitle(
        f"{data} ({rank}): planted atoms, and the most similar learned one with its cosine", fontsize=10
    )
    runs = [found for found in result.runs if found.data == data and found.images == IMAGES[0]]
    rows = [("planted", result.planted[data], None), *((r.model, r.matches, r.best) for r in runs)]
    axes = panel.subplots(len(rows), _SHOWN)
    for line, (name, atoms, best) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name.replace(", ", ",\n"), fontsize=8, rotation=0, ha="right", va="center")
        for i, axis in enumerate(line):
            axis.imshow(_picture(atoms[i]))
            axis.set(xticks=[], yticks=[])
            if best is not None:
                axis.set_title(f"{best[i]:.2f}", fontsize=8, pad=2)


def _picture(atom: Tensor) -> Any:
    """[height, width, 3] in [0, 1], a grey middle for 0, so that negative values are seen too."""
    return (0.5 + 0.5 * atom / atom.abs().max()).permute(1, 2, 0).numpy()


def _losses(axis: Any, result: TensorResult) -> None:
    for found in result.runs:
        if found.images == IMAGES[0]:
            style = "-" if found.data == "bars" else ":"
            label = f"{found.model}, {found.data}"
            axis.plot(smoothed(found.losses), style, color=COLOURS[found.model], label=label, linewidth=1.4)
    axis.set(xlabel="step", ylabel="training loss", title="Loss, 4096 training images")
    axis.legend(fontsize=7, ncols=2)


def _images(axis: Any, result: TensorResult) -> None:
    for model in dict.fromkeys(found.model for found in result.runs):
        found = [result.find("bars", model, images).explained_variance for images in IMAGES]
        axis.plot(IMAGES, found, "o-", color=COLOURS[model], label=model)
    axis.set(xscale="log", xlabel="training images", ylabel="explained variance")
    axis.set_xticks(IMAGES, [str(images) for images in IMAGES])
    axis.minorticks_off()
    axis.set_title("Held-out bars by the size of the training set")
    axis.legend(fontsize=8)
