"""The serving benchmark on this GPU, where vLLM for CUDA is installed."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

__all__ = ["serve"]

ROOT = Path(__file__).parents[2]
_IS_CUDA = "from vllm.platforms import current_platform as p; raise SystemExit(0 if p.is_cuda() else 1)"


def serve(folder: Path) -> str:
    """Run `python -m benchmarks.serving`, which writes serving.json into `folder`.

    Returns: what was run and how it ended, or that vLLM is not there.
    """
    if find_spec("vllm") is None:
        return "vllm: not present"
    if subprocess.run(
        [sys.executable, "-c", _IS_CUDA], cwd=ROOT, capture_output=True, check=False
    ).returncode:
        return "vllm: present, but not for CUDA"
    command = [sys.executable, "-m", "benchmarks.serving", "--out", str(folder.resolve() / "serving.json")]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode
    return f"{shlex.join(command)} ended with status {ended}"
