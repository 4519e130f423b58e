"""The parent's handle on one engine process: start it, let it work, keep it off the cores otherwise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .shapes import Served
from .workload import SAE_NAME, Batch

__all__ = ["Child"]

_STOP_SECONDS = 20


class Child:
    """One engine in its own process group, stopped (SIGSTOP) between its turns.

    An idle vLLM worker spins for a second after each step, which the next engine's turn would pay for.

    Args:
        served: the model and the SAE.
        plugin: with steerserve and the SAE hooked; without, vLLM loads no plugin at all.
        environment: variables for every process of the engine (core binding, cache size).
        log: where the engine's own output goes.
    """

    def __init__(self, served: Served, *, plugin: bool, environment: dict[str, str], log: Path) -> None:
        self._log = log
        options = {"model": str(served.model), **_ENGINE, **served.engine}
        if plugin:
            saes = [{"name": SAE_NAME, "path": str(served.sae)}]
            options["additional_config"] = {"steerserve": {"saes": saes}}
        names = {"VLLM_PLUGINS": "steerserve" if plugin else ""}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.engine"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                cwd=Path(__file__).parents[1],
                env={**os.environ, **environment, **names},
                start_new_session=True,
                text=True,
            )
        self._awake = True
        self._tell(options)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_ready(self) -> dict[str, Any]:
        """Returns: how the engine is set up, as it says itself."""
        description = self._hear()
        self.sleep()
        return description

    def turn(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Wake the engine, serve the batches, put it to sleep; see `benchmarks.engine.serve_turn`."""
        self._signal(signal.SIGCONT)
        self._awake = True
        self._tell([batch.wire for batch in batches])
        result = self._hear()
        self.sleep()
        return result

    def sleep(self) -> None:
        """Take every process of the engine off the cores."""
        self._signal(signal.SIGSTOP)
        self._awake = False

    def stop(self) -> None:
        """End the engine and every process of it."""
        if not self._awake:
            self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGTERM)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _tell(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            raise RuntimeError("an engine ended before it answered; its last words:\n" + "\n".join(tail))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        # The session's first process leads its group, whose id outlives it as long as anyone is in it.
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


# Production's settings: compiled, prefix caching on. Lengths are what the load needs.
_ENGINE: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 2048,
    "enable_prefix_caching": True,
    "gpu_memory_utilization": 0.2,
    "disable_log_stats": True,
    "seed": 0,
}
