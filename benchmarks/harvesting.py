"""A measured process that harvests: one engine, a turn is a harvest of random sequences to a new folder."""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steerserve.config import HarvestPoints
from steerserve_vllm.harvester import Harvester

from .memory import forget_peak, kib, processes
from .worker import Serve, work

__all__ = ["start"]

_POLL_SECONDS = 0.05


def start(options: dict[str, Any]) -> tuple[dict[str, Any], Serve]:
    """Args: options: `model`, `layer`, `vocab`, `length`, and the engine's arguments under `engine`."""
    harvester = Harvester(options["model"], HarvestPoints(layer=options["layer"]), **options["engine"])

    def serve(turn: dict[str, Any]) -> dict[str, Any]:
        folder = Path(tempfile.mkdtemp(prefix="harvest_", dir=turn["folder"]))
        prompts = _prompts(turn["seed"], turn["tokens"], options["length"], options["vocab"])
        before = {name: kib(process, "VmRSS") for name, process in processes().items()}
        peak = _Peak()
        began = time.perf_counter()
        activations = harvester.run(prompts, folder)
        seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in folder.iterdir())
        shutil.rmtree(folder)
        return {
            "seconds": seconds,
            "tokens": activations,
            "bytes": size,
            "kib_before": before,
            "kib_peak": peak.stop(),
        }

    return {"processes": list(processes())}, serve


def _prompts(seed: int, tokens: int, length: int, vocab: int) -> Iterator[list[int]]:
    rng = random.Random(seed)
    for _ in range(tokens // length):
        yield [rng.randrange(3, vocab) for _ in range(length)]


class _Peak:
    """The most memory that each process of this group has held since this object was made."""

    def __init__(self) -> None:
        for process in processes().values():
            forget_peak(process)
        self._most: dict[str, dict[str, int]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, dict[str, int]]:
        """Process → KiB: at most, and of that what is its own and what is of files, where it was largest."""
        self._stopped.set()
        self._thread.join()
        self._look()
        return self._most

    def _watch(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            self._look()

    def _look(self) -> None:
        for name, process in processes().items():
            most = self._most.setdefault(name, {})
            for kind in ("VmHWM", "RssAnon", "RssFile"):
                most[kind] = max(most.get(kind, 0), kib(process, kind))


if __name__ == "__main__":
    work(start)
