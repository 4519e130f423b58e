"""What steering adds to one step on the host."""

from __future__ import annotations

from typing import Any

from .markdown import machine, markdown

__all__ = ["step_table"]


def step_table(results: dict[str, Any]) -> str:
    """Markdown of the step benchmark's results: microseconds a step."""
    rows = []
    for case in results["cases"]:
        spent = case["microseconds"]
        shape = [case["phase"], case["requests"], case["tokens"], case["rows"], case["d_model"]]
        rows.append(
            [*map(str, shape), *(f"{spent[part]:.0f}" for part in ("begin", "steer", "settle", "step"))]
        )
    heads = "phase | requests | tokens | rows | d | begin | steer | settle | whole step"
    preface = f"{machine(results)}; medians of {results['repeats']} steps, microseconds."
    return preface + "\n\n" + markdown(heads, "---" + "|--:" * 8, rows)
