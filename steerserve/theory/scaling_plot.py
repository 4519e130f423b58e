"""The plot of a sweep: the loss by width, tokens and cost, with the fitted law, and how well that fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steerserve.experiments.style import new_figure

from .law import Law, Point
from .next_run import Proposal, flops

__all__ = ["draw"]

_SMOOTH = 60


def draw(points: Sequence[Point], law: Law, proposals: Sequence[Proposal], d_in: int, path: Path) -> None:
    """Write the plot as a PNG."""
    from matplotlib import colormaps

    figure = new_figure(13, 7.6)
    axes = figure.subplots(2, 2)
    ks = sorted({p.k for p in points})
    colours = dict(zip(ks, colormaps["viridis"](np.linspace(0, 0.85, len(ks))), strict=True))
    _by_width(axes[0, 0], points, law, proposals, colours)
    _by_tokens(axes[0, 1], points, law, colours)
    _by_cost(axes[1, 0], points, proposals, d_in, colours)
    _agreement(axes[1, 1], points, law, colours)
    figure.savefig(path, dpi=130)


def _by_width(
    axis: Any, points: Sequence[Point], law: Law, proposals: Sequence[Proposal], colours: dict[float, Any]
) -> None:
    most = max(p.tokens for p in points)
    widest = max([p.width for p in points] + [p.width for p in proposals])
    widths = np.geomspace(min(p.width for p in points), widest, _SMOOTH)
    for k, colour in colours.items():
        here = [p for p in points if p.k == k and p.tokens == most]
        axis.plot([p.width for p in here], [p.loss for p in here], "o", color=colour)
        axis.plot(widths, law.predict(k, widths, most), color=colour, label=f"k = {k:g}")
        axis.plot(widths, law.terms(k, widths, most)[:2].sum(0), ":", color=colour, linewidth=0.9)
    axis.set(xscale="log", yscale="log", xlabel="width", ylabel="unexplained variance")
    _plain_numbers(axis, sorted({p.width for p in points}))
    axis.set_title(f"{most:,.0f} tokens (dotted: trained for ever)", fontsize=10)
    axis.legend(fontsize=8)


def _by_tokens(axis: Any, points: Sequence[Point], law: Law, colours: dict[float, Any]) -> None:
    k = max(colours)
    tokens = np.geomspace(min(p.tokens for p in points), 4 * max(p.tokens for p in points), _SMOOTH)
    for width, style in zip(sorted({p.width for p in points}), _shades(points), strict=True):
        here = sorted((p.tokens, p.loss) for p in points if p.k == k and p.width == width)
        if not here:
            continue
        axis.plot(*zip(*here, strict=True), "o", color=style)
        axis.plot(tokens, law.predict(k, width, tokens), color=style, label=f"width {width:g}")
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="unexplained variance")
    _plain_numbers(axis, sorted({p.tokens for p in points}))
    axis.set_title(f"k = {k:g}", fontsize=10)
    axis.legend(fontsize=8)


def _plain_numbers(axis: Any, xs: Sequence[float] = ()) -> None:
    """Numbers as people write them, instead of powers of ten. Args: xs: where x has its ticks."""
    from matplotlib.ticker import FuncFormatter

    number = FuncFormatter(lambda value, _: f"{value:.2g}")
    axis.yaxis.set_major_formatter(number)
    axis.yaxis.set_minor_formatter(number)
    if xs:
        axis.set_xticks(xs, [f"{x:,.0f}" for x in xs])
        axis.set_xticks([], minor=True)


def _shades(points: Sequence[Point]) -> Any:
    from matplotlib import colormaps

    return colormaps["plasma"](np.linspace(0, 0.85, len({p.width for p in points})))


def _by_cost(
    axis: Any, points: Sequence[Point], proposals: Sequence[Proposal], d_in: int, colours: dict[float, Any]
) -> None:
    for p in points:
        axis.plot(flops(p.k, p.width, p.tokens, d_in), p.loss, "o", color=colours[p.k], markersize=4)
    for number, one in enumerate(proposals):
        label = "next, predicted" if number == 0 else None
        axis.plot(one.flops, one.loss, "*", color=colours[one.k], markersize=13, label=label)
        text = f" F {one.width:,}, {one.tokens / 1e6:.3g}M tokens"
        axis.annotate(text, (one.flops, one.loss), fontsize=7, va="bottom", ha="right")
    axis.set(xscale="log", yscale="log", xlabel="operations of the run", ylabel="unexplained variance")
    _plain_numbers(axis)
    axis.set_title("Cost, and which run to do next", fontsize=10)
    axis.legend(fontsize=8)


def _agreement(axis: Any, points: Sequence[Point], law: Law, colours: dict[float, Any]) -> None:
    for k, colour in colours.items():
        here = [p for p in points if p.k == k]
        predicted = [float(law.predict(p.k, p.width, p.tokens)) for p in here]
        axis.plot(predicted, [p.loss for p in here], "o", color=colour, markersize=4)
    ends = [min(p.loss for p in points), max(p.loss for p in points)]
    axis.plot(ends, ends, color="#999999", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="predicted", ylabel="measured")
    _plain_numbers(axis)
    axis.set_title(f"The fit: {law.error:.1%} off (root mean square)", fontsize=10)
