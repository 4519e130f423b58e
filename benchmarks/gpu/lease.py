"""All that a GPU which is lent for a quarter of an hour should be asked: `python -m benchmarks.gpu.lease`.

Seven stages, each a process with a time limit of its own. One that fails or hangs is recorded, and the next
one begins. lease.json is written after each, so that what was found is kept whatever ends the machine.

`--rehearse` runs the same stages where there is no GPU: on `meta`, and in Triton's interpreter on sizes that
it can do. `--wheels DIR` fetches what the machine lacks, to be carried there: it has Python 3.12, torch for
CUDA, triton, transformers, pytest and numba. There, `python -m pip install --no-index --no-deps DIR/*.whl`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["STAGES", "WHEELS", "Stage", "main", "run_stage"]

ROOT = Path(__file__).parents[2]
# What steerserve imports to steer, and a machine for PyTorch has not.
WHEELS = (
    "annotated-types",
    "markdown-it-py",
    "mdurl",
    "pydantic",
    "pydantic-core",
    "pygments",
    "rich",
    "typing-inspection",
)
_TAIL = 4000


@dataclass(frozen=True)
class Stage:
    """A question, and the seconds that it may take. Args: words: of the command line; needs: a program."""

    name: str
    seconds: float
    words: tuple[str, ...]
    needs: str = ""


def _stage(name: str, seconds: float, question: str) -> Stage:
    return Stage(name, seconds, ("-m", "benchmarks.gpu.stages", question))


_SANITIZE = ("-m", "benchmarks.gpu.stages", "smallest")
_MEASURE = ("-m", "benchmarks.gpu", "--batches", "1", "64", "256")
STAGES = (
    _stage("start", 20, "start"),
    _stage("kernels", 75, "kernels"),
    _stage("schedule", 60, "schedule"),
    _stage("replay", 60, "replay"),
    _stage("waits", 30, "waits"),
    Stage("sanitizer", 60, _SANITIZE, needs="compute-sanitizer"),
    Stage("measure", 150, _MEASURE),
)


def run_stage(stage: Stage, out: Path, *, rehearse: bool) -> dict[str, Any]:
    """Run one stage to its end or to its limit.

    Returns: its status (`ok`, `failed`, `timeout` or `absent`), the seconds it took, and what it printed.
    """
    command, environment = _command(stage, out, rehearse), dict(os.environ)
    if rehearse:
        environment["TRITON_INTERPRET"] = "1"
    found: dict[str, Any] = {**asdict(stage), "command": command}
    if stage.needs and not rehearse and shutil.which(stage.needs) is None:
        return found | {"status": "absent", "detail": f"{stage.needs} is not installed"}
    # The interpreter takes much longer.
    limit, began = stage.seconds * (10 if rehearse else 1), time.monotonic()
    with tempfile.TemporaryFile() as sink:
        status = _wait(command, environment, sink, limit)
        sink.seek(0)
        said = sink.read().decode(errors="replace")
    return found | {
        "status": status,
        "took": round(time.monotonic() - began, 1),
        "found": _found(said) if status == "ok" else None,
        "said": said[-_TAIL:],
    }


def _command(stage: Stage, out: Path, rehearse: bool) -> list[str]:
    command = [sys.executable, *stage.words]
    if stage.words[1] == "benchmarks.gpu":
        return [*command, "--out", str(out / "measure"), *(["--help"] if rehearse else [])]
    if rehearse:
        return [*command, "--device", "cpu"]
    return [stage.needs, "--error-exitcode", "9", *command] if stage.needs else command


def _wait(command: Sequence[str], environment: dict[str, str], sink: Any, limit: float) -> str:
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return "ok" if process.wait(limit) == 0 else "failed"
    except subprocess.TimeoutExpired:
        # What it started goes with it: nothing else may hold the GPU in the next stage.
        os.killpg(process.pid, 9)
        process.wait()
        return "timeout"


def _found(said: str) -> Any:
    """The JSON of the last line, where a stage prints one."""
    try:
        return json.loads(said.strip().splitlines()[-1])
    except (json.JSONDecodeError, IndexError):
        return None


def fetch(folder: Path) -> int:
    """Download the wheels, in the versions that are installed here, for the machine's Python.

    Returns: pip's exit status.
    """
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--platform=manylinux2014_x86_64"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), *wanted]
    return subprocess.run(command, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns: exit status; 0 if every stage that could be run was right."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.lease",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    todo = parser.add_mutually_exclusive_group(required=True)
    todo.add_argument("--out", type=Path, metavar="DIR", help="where the results are written")
    todo.add_argument("--wheels", type=Path, metavar="DIR", help="only fetch what the machine lacks, to here")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, in Triton's interpreter")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stage", choices=names, action="append", help="only this one, or these")
    given = parser.parse_args(arguments)
    if given.wheels is not None:
        return fetch(given.wheels)
    out: Path = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for stage in STAGES:
        if given.stage is None or stage.name in given.stage:
            results.append(run_stage(stage, out, rehearse=given.rehearse))
            (out / "lease.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(f"{stage.name}: {results[-1]['status']}", flush=True)
    return int(any(one["status"] in ("failed", "timeout") for one in results))


if __name__ == "__main__":
    sys.exit(main())
