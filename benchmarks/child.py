"""The parent's handle on one measured process: start it, let it work, keep it off the cores otherwise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from .settings import Setup

__all__ = ["Child"]

_STOP_SECONDS = 20


class Child:
    """One process and all it starts, in a group of its own, stopped (SIGSTOP) between its turns.

    An idle vLLM worker spins for a second after each step, which the next engine's turn would pay for.

    Args:
        setup: what is started.
        log: where the process's own output goes.
    """

    def __init__(self, setup: Setup, log: Path) -> None:
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", setup.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                cwd=Path(__file__).parents[1],
                env={**os.environ, **setup.environment},
                start_new_session=True,
                text=True,
            )
        self._awake = True
        self._tell(setup.options)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_ready(self) -> dict[str, Any]:
        """Returns: how the process is set up, as it says itself."""
        description = self._hear()
        self.sleep()
        return description

    def turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        """Wake the process, let it serve the turn, put it to sleep; returns its answer."""
        self._signal(signal.SIGCONT)
        self._awake = True
        self._tell(turn)
        result = self._hear()
        self.sleep()
        return result

    def sleep(self) -> None:
        """Take every process of the group off the cores."""
        self._signal(signal.SIGSTOP)
        self._awake = False

    def stop(self) -> None:
        """End every process of the group."""
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
            tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-60:]
            raise RuntimeError("a process ended before it answered; its last words:\n" + "\n".join(tail))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        # The session's first process leads its group, whose id outlives it as long as anyone is in it.
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return
