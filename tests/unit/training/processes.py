"""Two processes that share a run."""

from __future__ import annotations

import os
import subprocess
import sys

__all__ = ["torchrun"]


def torchrun(*words: str) -> str:
    """Start a command in two processes. Returns: what they said, to be told where they left no result.

    Their exit is not looked at: now and then torch's gloo aborts a process that is done, as it ends.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    return ran.stdout + ran.stderr
