"""vLLM's processes, forked from one that has imported it: an import takes twenty seconds, a fork none.

vLLM's CPU platform starts its engine core and its workers by `spawn`, each of which imports everything again.
`fork_engines` makes them forks of this process instead. The V2 model runner needs a process in which Triton's
interpreter was set up before the import: its processes are forks of a fork server that was started so.

One start by `spawn` and by the real command is left to tests/server/test_demo.py.
"""

from __future__ import annotations

import os
import warnings
from multiprocessing.context import (
    BaseContext,
    ForkContext,
    ForkProcess,
    ForkServerContext,
    ForkServerProcess,
)
from pathlib import Path

import pytest

__all__ = ["INTERPRETER", "fork_engines", "interpret"]

# Holds a sitecustomize.py, which reaches a new process by PYTHONPATH.
INTERPRETER = Path(__file__).parent / "interpreter"
ROOT = Path(__file__).parents[2]


def fork_engines() -> None:
    """From now on, vLLM forks the processes that this one starts. Harmless when called again."""
    import vllm.model_executor.models.registry
    import vllm.utils.system_utils
    import vllm.v1.utils

    # Their only use of the module is to ask it for a context.
    vllm.utils.system_utils.multiprocessing = _Forking
    vllm.v1.utils.multiprocessing = _Forking
    # Of each model class that it has not met, it would ask another new process.
    vllm.model_executor.models.registry._run_in_subprocess = lambda ask: ask()


def interpret(patch: pytest.MonkeyPatch) -> None:
    """Let the engines that are started now run the V2 model runner, in Triton's interpreter."""
    patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    for folder in (ROOT, INTERPRETER):
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    # This process, which runs no kernel, looked for Triton before there was any.
    patch.setattr("vllm.config.vllm.HAS_TRITON", True)


class _Forking:
    """In the place of the module `multiprocessing`."""

    @staticmethod
    def get_context(method: str | None = None) -> BaseContext:
        """A context that forks, whichever is asked for."""
        wants_interpreter = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
        has_interpreter = os.environ.get("TRITON_INTERPRET") == "1"
        return _of_fork_server if wants_interpreter and not has_interpreter else _of_this_process


class _Forked(ForkProcess):
    """A fork of this process, whose warnings are no errors."""

    def run(self) -> None:
        warnings.simplefilter("ignore")
        super().run()


class _Interpreted(ForkServerProcess):
    """A fork of the fork server, with the environment of the process that asks, as `spawn` would have it."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment, TRITON_INTERPRET="1")
        super().run()


class _ForkContext(ForkContext):
    Process = _Forked  # type: ignore[assignment]


class _ForkServerContext(ForkServerContext):
    Process = _Interpreted  # type: ignore[assignment]


_of_this_process, _of_fork_server = _ForkContext(), _ForkServerContext()
# Imported by the fork server as it starts, which is when the first process is asked for.
_of_fork_server.set_forkserver_preload(["tests.support.preloaded"])
