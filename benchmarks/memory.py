"""What the processes of this one hold in memory, as the kernel counts it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["forget_peak", "kib", "processes"]

_FORGET_PEAK = "5"


def processes() -> dict[str, int]:
    """This process ("driver") and those that it started, by name: vLLM names its engine's."""
    found = {"driver": os.getpid()}
    for child in _children(os.getpid()):
        name = Path(f"/proc/{child}/comm").read_text(encoding="utf-8").strip()
        # A helper of multiprocessing has Python's own name.
        if name.startswith("VLLM"):
            found[name] = child
    return found


def kib(process: int, field: str) -> int:
    """A field of /proc/PID/status, in KiB."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise ValueError(f"expected {field} among the kernel's figures of process {process}")


def forget_peak(process: int) -> None:
    """Let the kernel count the peak (VmHWM) from now on."""
    Path(f"/proc/{process}/clear_refs").write_text(_FORGET_PEAK, encoding="utf-8")


def _children(process: int) -> list[int]:
    own: list[int] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            own += map(int, (task / "children").read_text(encoding="utf-8").split())
    return [found for child in own for found in (child, *_children(child))]
