"""Pieces that the tables share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["machine", "markdown", "settings", "spread"]


def spread(spread: dict[str, float], digits: int) -> list[str]:
    """Two cells: the median, and the quartiles."""
    low, high = spread["low"], spread["high"]
    return [f"{spread['median']:.{digits}f}", f"{low:.{digits}f} to {high:.{digits}f}"]


def machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return f"{machine['cpu']}, {machine['cores']} cores; Python {machine['python']}, {packages}"


def settings(results: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in results["environment"].items())


def markdown(heads: str, rule: str, rows: Iterable[list[str]]) -> str:
    lines = [heads, *(" | ".join(row) for row in rows)]
    head, *body = (f"| {line} |" for line in lines)
    return "\n".join([head, f"|{rule}|", *body])
