"""Which planted features were found, by both trainers."""

from __future__ import annotations

from typing import Any

from .markdown import machine, markdown

__all__ = ["recovery_table", "synthetic_table"]

_TOY = ("mmcs", "mcc", "explained_variance", "l0", "dead_fraction")
_SYNTHETIC = ("f1", "mcc", "explained_variance", "uniqueness", "l0", "dead")


def recovery_table(results: dict[str, Any]) -> str:
    """Markdown of the toy's recovery."""
    return _table(results, _TOY)


def synthetic_table(results: dict[str, Any]) -> str:
    """Markdown of the small SynthSAEBench."""
    return _table(results, _SYNTHETIC)


def _table(results: dict[str, Any], scores: tuple[str, ...]) -> str:
    """Ours, and the best by MCC of SAELens' settings, for each architecture that both have run."""
    setup, rows = results["setup"], results["rows"]
    written = []
    for name in dict.fromkeys(row["architecture"] for row in rows):
        here = [row for row in rows if row["architecture"] == name]
        theirs = [row for row in here if row["side"] == "saelens"]
        best = max(theirs, key=lambda row: float(row["mcc"]), default=None)
        for row in (next(row for row in here if row["side"] == "ours"), best):
            if row is not None:
                side = row["side"] if row["side"] == "ours" else f"SAELens, best of {len(theirs)}"
                written.append([name, side, *(f"{row[score]:.3f}" for score in scores)])
    size = f"d {setup['d_in']}, F {setup['features']}, {setup['steps']:,} steps of {setup['batch']:,}"
    seeds = ", ".join(map(str, results["seeds"]))
    heads = " | ".join(("architecture", "trainer", *(score.replace("_", " ") for score in scores)))
    table = markdown(heads, "---|---" + "|--:" * len(scores), written)
    return f"{machine(results)}; {size}; mean over seeds {seeds}.\n\n{table}"
