"""What the experiments' plots share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerserve.errors import ConfigError

__all__ = ["COLOURS", "new_figure", "ready_folder", "smoothed"]

_WINDOW = 20
COLOURS = {
    "tensor": "#0b5394",
    "functional": "#0b5394",
    "same kernels as taps": "#38761d",
    "flat, equal latents": "#cc4125",
    "flat, equal parameters": "#e69138",
}


def _require_matplotlib() -> None:
    """Raises: ConfigError if matplotlib is not installed, before an experiment has run for nothing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "expected matplotlib for the plot, it is not installed: pip install 'steerserve[train]'"
        ) from None


def ready_folder(out: Path) -> Path:
    """The folder for results and plots, made if it is not there.

    Raises: ConfigError if it cannot be made, or matplotlib is not installed.
    """
    _require_matplotlib()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"expected a folder to write at --out {out}: {error.strerror}") from None
    return out


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, that no window shows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def smoothed(values: Sequence[float]) -> list[float]:
    """Each value's mean with up to 19 before it."""
    return [
        sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - _WINDOW) : i + 1])
    ]
