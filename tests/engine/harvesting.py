"""What the tests of harvests share: the engine, the command, and what tells folders apart."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["ENGINE", "LAYERS", "LONGEST", "fingerprints", "start_command"]

LAYERS = (0, 1)
LONGEST = 127
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": LONGEST + 1,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 48,
    "gpu_memory_utilization": 0.2,
}


def fingerprints(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def start_command(
    model: Path, corpus: Path, out: Path, *more: str, said: Path | None = None
) -> subprocess.Popen[bytes]:
    """`steerserve harvest`, with the engine of the other tests. Args: said: a file for its stderr."""
    engine = [
        word
        for name, value in ENGINE.items()
        for word in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]
    layers = [word for layer in LAYERS for word in ("--layer", str(layer))]
    ours = [str(model), str(corpus), str(out), *layers, "--rows-per-shard", "1000"]
    main = "from steerserve.cli import main; main()"
    command = [sys.executable, "-c", main, "harvest", *ours, *engine, *more]
    if said is None:
        return subprocess.Popen(command)
    with said.open("wb") as stderr:
        return subprocess.Popen(command, stderr=stderr)
