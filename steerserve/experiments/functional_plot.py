"""The plot of the experiment on functions: kernels, one function taken apart, loss, and resolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .field_run import FieldRun
from .functional import FunctionalResult, Shown
from .style import COLOURS, new_figure, smoothed

__all__ = ["draw"]


def draw(result: FunctionalResult, path: Path) -> None:
    """Write the plot as a PNG."""
    figure = new_figure(13, 11)
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(1, 1.25, 1.15))
    _curves(top, result.kernels["curves"])
    left, right = middle.subfigures(1, 2, width_ratios=(1.15, 1))
    _patches(left, result.kernels["patches"])
    _example(right, result)
    loss, curves, patches = bottom.subplots(1, 3)
    _losses(loss, result)
    _resolutions(curves, result, "curves")
    _resolutions(patches, result, "patches")
    figure.savefig(path, dpi=130)


def _curves(panel: Any, kernels: Shown) -> None:
    panel.suptitle(
        "Kernels on the circle: planted (grey) and learned (blue), shifted onto each other", fontsize=10
    )
    places = torch.fft.fftshift(torch.fft.fftfreq(kernels.planted.shape[1])).numpy()
    for i, axis in enumerate(panel.subplots(1, len(kernels.planted), sharey=True)):
        axis.plot(places, torch.fft.fftshift(kernels.planted[i]).numpy(), color="#999999", linewidth=4)
        axis.plot(
            places, torch.fft.fftshift(kernels.learned[i]).numpy(), color=COLOURS["functional"], linewidth=1.3
        )
        axis.set_title(f"kernel {i}, cosine {kernels.cosines[i]:.3f}", fontsize=8)
        axis.set_xlim(-0.3, 0.3)
        axis.tick_params(labelsize=7)


def _patches(panel: Any, kernels: Shown) -> None:
    panel.suptitle("Kernels on the 2-D torus: planted above, learned below", fontsize=10)
    both = panel.subplots(2, len(kernels.planted))
    for line, functions in zip(both, (kernels.planted, kernels.learned), strict=True):
        for i, axis in enumerate(line):
            most = float(functions[i].abs().max())
            axis.imshow(torch.fft.fftshift(functions[i]).numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
            axis.set(xticks=[], yticks=[])
    for axis, cosine in zip(both[1], kernels.cosines, strict=True):
        axis.set_title(f"{cosine:.3f}", fontsize=8, pad=2)


def _example(panel: Any, result: FunctionalResult) -> None:
    """One function, and below it every feature's activation function with the planted places marked."""
    example = result.example
    panel.suptitle("A held-out function, x̂, and its activation functions z", fontsize=10)
    above, below = panel.subplots(2, 1, sharex=True)
    places = torch.arange(len(example.x)).numpy() / len(example.x)
    above.plot(places, example.x.numpy(), color="#999999", linewidth=4, label="x")
    above.plot(places, example.reconstruction.numpy(), color=COLOURS["functional"], linewidth=1.3, label="x̂")
    above.legend(fontsize=8)
    for i, (z, kernel) in enumerate(zip(example.z, example.kernel, strict=True)):
        label = f"z{i} (kernel {kernel})" if z.max() > 0 else None
        below.plot(places, z.numpy(), drawstyle="steps-mid", linewidth=1.2, label=label)
    events = example.events
    for kernel, place, strength in zip(events.concept[0], events.place[0], events.strength[0], strict=True):
        if strength > 0:
            below.axvline(float(place), color="black", linestyle=":", linewidth=1)
            below.annotate(f" {int(kernel)}", (float(place), 0.93), xycoords=("data", "axes fraction"))
    below.set(xlabel="place; dotted: which kernel was planted, and where", ylabel="z")
    below.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _losses(axis: Any, result: FunctionalResult) -> None:
    for run in result.runs:
        if run.losses and run.data != "fixed places":
            style = "-" if run.data == "curves" else ":"
            label = f"{run.model}, {run.data}"
            axis.plot(smoothed(run.losses), style, color=_colour(run), label=label, linewidth=1.4)
    axis.set(xlabel="step", ylabel="training loss", yscale="log", title="Loss")
    axis.legend(fontsize=7)


def _resolutions(axis: Any, result: FunctionalResult, data: str) -> None:
    runs = [run for run in result.runs if run.data == data]
    grids = sorted(runs[0].explained_variance, key=lambda name: int(name.split("×")[0]))
    for run in runs:
        values = [max(-0.2, run.explained_variance[grid]) for grid in grids]
        axis.plot(grids, values, "o-", color=_colour(run), label=run.model, markersize=4)
    axis.axvline(next(iter(runs[0].explained_variance)), color="black", linestyle=":", linewidth=1)
    axis.set(xlabel="grid (dotted: of training)", ylabel="explained variance", ylim=(-0.25, 1.03))
    axis.set_title(f"The same {data} on other grids")
    axis.legend(fontsize=7)


def _colour(run: FieldRun) -> str:
    return COLOURS.get(run.model, COLOURS["flat, equal latents"])
