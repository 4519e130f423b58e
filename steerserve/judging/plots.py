"""The report's plots, as SVG to stand inside a page: drawn from the report's JSON."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["COLOURS", "concepts", "density", "frontier", "steering", "strengths", "training"]

Report = dict[str, Any]

# Told apart also by those who see red and green alike (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7a7a7a")
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#b8bec7",
    "axes.grid": True,
    "axes.labelcolor": "#39424e",
    "axes.labelsize": 10.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "grid.color": "#e8ebef",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "xtick.color": "#5b6570",
    "ytick.color": "#5b6570",
}
_TRAINING = {
    "loss": "loss",
    "explained_variance": "explained variance",
    "l0": "L0 [active features per token]",
    "dead_share": "dead features [share]",
    "tokens_per_second": "speed [tokens/s]",
}
# Text is measured in matplotlib's own font and shown in the page's.
_MEASURED, _SHOWN = "'DejaVu Sans', sans-serif", "system-ui, 'DejaVu Sans', sans-serif"


def density(saes: Sequence[Report]) -> str:
    """How many features fire how often."""

    def draw(axes: Any) -> None:
        for sae, colour in zip(saes, _colours(len(saes)), strict=True):
            histogram = sae["reconstruction"]["density"]
            axes.stairs(histogram["counts"], histogram["edges"], color=colour, lw=1.8, label=sae["name"])
            if len(saes) == 1:
                axes.stairs(histogram["counts"], histogram["edges"], color=colour, fill=True, alpha=0.18)
        axes.axvline(-1, color="#9aa3ad", lw=1, ls=":")
        axes.annotate("dense", (-1, 1), xycoords=("data", "axes fraction"), fontsize=8.5,
                      xytext=(5, -10), textcoords="offset points", color="#6b7480")  # fmt: skip
        axes.set_xlabel("firing rate [log₁₀ share of tokens]")
        axes.set_ylabel("features per bin")
        axes.set_ylim(bottom=0)
        axes.set_xlim(_first_edge(saes), 0)
        if len(saes) > 1:
            axes.legend(fontsize=9, loc="upper left")

    return _single("density", draw)


def frontier(saes: Sequence[Report]) -> str:
    """Explained variance against L0, one point for each SAE."""

    def draw(axes: Any) -> None:
        for sae, colour in zip(saes, _colours(len(saes)), strict=True):
            found = sae["reconstruction"]
            place = (found["l0"], found["explained_variance"])
            axes.scatter(*place, color=colour, s=52, zorder=3, edgecolor="white", linewidth=1)
            axes.annotate(sae["name"], place, xytext=(7, 5), textcoords="offset points", fontsize=9,
                          color="#39424e")  # fmt: skip
        axes.margins(0.25)
        axes.set_xlabel("L0 [active features per token]")
        axes.set_ylabel("explained variance (centred)")

    return _single("frontier", draw)


def training(saes: Sequence[Report]) -> str:
    """Curves of every training log, one panel for each quantity; empty if there is no log."""
    logs = [(sae, colour) for sae, colour in zip(saes, _colours(len(saes)), strict=True) if sae["training"]]
    known = {key for sae, _ in logs for row in sae["training"] for key in row}
    panels = [(key, title) for key, title in _TRAINING.items() if key in known]
    if not panels:
        return ""

    def draw(figure: Any) -> None:
        for number, (key, title) in enumerate(panels, 1):
            axes = figure.add_subplot(-(-len(panels) // 3), min(3, len(panels)), number)
            for sae, colour in logs:
                own = [row for row in sae["training"] if key in row]
                steps, values = [row["step"] for row in own], [row[key] for row in own]
                axes.plot(steps, values, color=colour, lw=1.5, label=sae["name"])
            axes.set_xlabel("training step")
            axes.set_ylabel(title)
            if number == 1 and len(logs) > 1:
                axes.legend(fontsize=8.5)

    return _figure("training", (10.4, 3.0 * -(-len(panels) // 3)), draw)


def concepts(sae: Report) -> str:
    """Each concept's F1 by a single latent and by a linear probe, on single tokens."""
    rows = sorted(sae["labelled"]["concepts"], key=lambda row: row["latent"]["f1"])
    shown = (("latent", "single latent", COLOURS[0]), ("probe", "linear probe", COLOURS[1]))

    def draw(axes: Any) -> None:
        for at, row in enumerate(rows):
            axes.plot([row[key]["f1"] for key, _, _ in shown], [at, at], color="#cfd5dc", lw=2.2, zorder=2)
        for key, title, colour in shown:
            scores = [row[key]["f1"] for row in rows]
            axes.scatter(scores, range(len(rows)), color=colour, s=44, zorder=3, label=title)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.set_xlim(0, 1.02)
        axes.set_xlabel("F1 on held-out tokens")
        axes.grid(axis="y", visible=False)
        axes.legend(fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.45, 1.0))

    return _single("concepts", draw, height=1.4 + 0.26 * len(rows))


def steering(sae: Report) -> str:
    """Each method's three axes and their harmonic mean."""
    methods = sorted(sae["steering"]["methods"].items(), key=lambda item: item[1]["overall"])
    shown = dict(zip(("concept", "instruct", "fluency", "overall"), (*COLOURS[:3], "#1f2933"), strict=True))

    def draw(axes: Any) -> None:
        for place, (name, colour) in enumerate(shown.items()):
            heights = [row + 0.27 - 0.18 * place for row in range(len(methods))]
            axes.barh(heights, [scores[name] for _, scores in methods], 0.16, color=colour, label=name)
        for row, (_, scores) in enumerate(methods):
            axes.annotate(f"{scores['overall']:.2f}", (scores["overall"], row - 0.27), xytext=(4, 0),
                          textcoords="offset points", va="center", fontsize=8.5)  # fmt: skip
        axes.set_yticks(range(len(methods)), [name for name, _ in methods])
        axes.set_xlim(0, 2.05)
        axes.set_xlabel("score [0 to 2], mean over concepts and held-out prompts")
        axes.grid(axis="y", visible=False)
        axes.legend(fontsize=9, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0))

    return _single("steering", draw, height=1.3 + 0.6 * len(methods))


def strengths(sae: Report) -> str:
    """Concept against fluency as the strength grows, on the prompts that chose."""
    rows = sae["steering"]["strengths"]
    methods = list(dict.fromkeys(row["method"] for row in rows))

    def draw(axes: Any) -> None:
        for method, colour in zip(methods, _colours(len(methods)), strict=True):
            own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["strength"])
            axes.plot([row["fluency"] for row in own], [row["concept"] for row in own], "o-", color=colour,
                      lw=1.5, ms=4.5, label=method)  # fmt: skip
            for row in (own[0], own[-1]):
                axes.annotate(f"{row['strength']:g}×", (row["fluency"], row["concept"]), xytext=(5, 4),
                              textcoords="offset points", fontsize=8, color=colour)  # fmt: skip
        axes.set_xlim(0, 2.05)
        axes.set_ylim(0, 2.05)
        axes.set_xlabel("fluency [0 to 2]")
        axes.set_ylabel("concept [0 to 2]")
        axes.legend(fontsize=9)

    return _single("strengths", draw, height=4.0)


def _first_edge(saes: Sequence[Report]) -> float:
    """Where the rarest feature of any SAE lies, and a little before."""
    found = [sae["reconstruction"]["density"] for sae in saes]
    edges = (edge for one in found for edge, count in zip(one["edges"], one["counts"], strict=False) if count)
    return float(min([*edges, -1.5])) - 0.5


def _colours(count: int) -> list[str]:
    return [COLOURS[at % len(COLOURS)] for at in range(count)]


def _single(name: str, draw: Callable[[Any], None], height: float = 3.4) -> str:
    return _figure(name, (5.4, height), lambda figure: draw(figure.add_subplot()))


def _figure(name: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    # The salt makes the ids inside the picture its own, and the same in every run.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        out = io.StringIO()
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=none)
    # Inside a page, the prologue has no place.
    picture = out.getvalue().replace(_MEASURED, _SHOWN)
    return picture[picture.index("<svg") :]
