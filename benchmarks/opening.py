"""One process that opens an SAE or names features of it, and says what that took; started by `million.py`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from steerserve.catalog import build_catalog
from steerserve.config import SaeConfig, SteerserveConfig
from steerserve.sae import Sae, open_sae

from .sparse import WEIGHTS, feature_values

__all__ = ["main"]

_MIB = 2**20


def time_opening(task: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of `open_sae`, and what it adds to memory."""
    before = _memory()
    started = time.perf_counter()
    sae = open_sae(task["folder"])
    took = (time.perf_counter() - started) * 1e3
    return {"ms": took, "growth_mib": _growth(before), "d_sae": sae.d_sae}


def time_catalog(task: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of `build_catalog`, and seconds since the process began, imports and all."""
    config = SteerserveConfig(saes=[SaeConfig(name="bench", path=Path(task["folder"]))])
    started = time.perf_counter()
    build_catalog(config, n_layers=4, d_model=task["d_in"])
    took = (time.perf_counter() - started) * 1e3
    return {"ms": took, "process_s": time.clock_gettime(time.CLOCK_BOOTTIME) - _born()}


def time_features(task: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each feature's first use, and what naming all of them adds to memory.

    cold: the kernel has no page of the file in memory (but those of a small file, which opening it scans).
    hole: likewise, of features that were never written, which the kernel makes up without the disk.
    warm: every page that is needed is in memory.
    """
    weights = Path(task["folder"]) / WEIGHTS
    before = _memory()
    sae = open_sae(task["folder"])
    opened = _growth(before)
    cold = _first_uses(sae, task["written"], lambda: _forget_pages(weights))
    named = _growth(before)
    hole = _first_uses(sae, task["holes"], lambda: _forget_pages(weights))
    _check_values(sae, task["written"])
    for feature in task["written"]:
        open_sae(task["folder"]).rows([feature])
    warm = _first_uses(open_sae(task["folder"]), task["written"], lambda: None)
    return {"growth_mib": {"opened": opened, "named": named}, "cold": cold, "hole": hole, "warm": warm}


def _first_uses(sae: Sae, features: Sequence[int], prepare: Callable[[], None]) -> dict[str, list[float]]:
    wall, processor = [], []
    for feature in features:
        prepare()
        started = time.perf_counter(), time.process_time()
        sae.rows([feature])
        wall.append((time.perf_counter() - started[0]) * 1e3)
        processor.append((time.process_time() - started[1]) * 1e3)
    return {"wall": wall, "cpu": processor}


def _check_values(sae: Sae, features: Sequence[int]) -> None:
    for feature in features:
        rows, (encoder, decoder) = sae.rows([feature]), feature_values(feature, sae.d_in)
        assert torch.equal(rows.encoder[0], encoder.float())
        assert torch.equal(rows.decoder[0], decoder.float())


def _forget_pages(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _memory() -> dict[str, float]:
    names = {"VmRSS": "rss", "RssAnon": "anonymous", "RssFile": "file"}
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(tuple(names))}
    return {names[key]: int(kib) * 1024 / _MIB for key, kib in found.items()}


def _growth(before: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in _memory().items()}


def _born() -> float:
    """When this process began, in seconds since the machine did."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


_TASKS = {"catalog": time_catalog, "features": time_features, "open": time_opening}


def main() -> None:
    """Do the task of the command line and print what it took, as JSON."""
    torch.set_num_threads(1)
    task = json.loads(sys.argv[1])
    print(json.dumps(_TASKS[task["task"]](task)))


if __name__ == "__main__":
    main()
