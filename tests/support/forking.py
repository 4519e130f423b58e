"""vLLM's processes, forked from one that has imported it: an import takes ten to twenty seconds, a fork none.

vLLM's CPU platform starts its engine core and its workers by `spawn`, each of which imports everything again.
Here they are forks of a fork server, a process in which nothing happens but that import. Each model
runner has its own, as V2 needs Triton's interpreter set up before.

One start by `spawn` and by the real command is left to tests/server/test_demo.py.
"""

from __future__ import annotations

import os
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import BaseContext, ForkContext, ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from unittest import mock

import pytest

__all__ = ["INTERPRETER", "fork_engines", "interpret", "prepare"]

# Holds a sitecustomize.py, which reaches a new process by PYTHONPATH.
INTERPRETER = Path(__file__).parent / "interpreter"
ROOT = Path(__file__).parents[2]


def fork_engines(*, here: bool = False) -> None:
    """From now on, what this process starts of vLLM is forked. Args: here: from this process itself."""
    import vllm.model_executor.models.registry
    import vllm.utils.system_utils
    import vllm.v1.utils

    # Their only use of the module is to ask it for a context.
    context = _OfThisProcess if here else _OfAServer
    vllm.utils.system_utils.multiprocessing = context
    vllm.v1.utils.multiprocessing = context
    # Of each model class that it has not met, it would ask another new process.
    vllm.model_executor.models.registry._run_in_subprocess = lambda ask: ask()


def interpret(patch: pytest.MonkeyPatch) -> None:
    """Let the engines that are started now run the V2 model runner, in Triton's interpreter."""
    patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    patch.setenv("PYTHONPATH", str(INTERPRETER), prepend=os.pathsep)
    # This process, which runs no kernel, looked for Triton before there was any.
    patch.setattr("vllm.config.vllm.HAS_TRITON", True)


@cache
def prepare(*, interpreted: bool = False) -> ForkServer:
    """Start the fork server of a model runner, which imports in the background."""
    server = ForkServer()
    server.set_forkserver_preload(["tests.support.preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        if interpreted:
            patch.setenv("PYTHONPATH", str(INTERPRETER), prepend=os.pathsep)
        server.ensure_running()
    return server


class _Forked(ForkServerProcess):
    """A fork of a fork server, with the environment of the process that asks, as `spawn` would have it."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        server = prepare(interpreted=os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1")
        with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
            super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
            os.environ["TRITON_INTERPRET"] = "1"
        super().run()


class _ForkServerContext(ForkServerContext):
    Process = _Forked  # type: ignore[assignment]


_fork, _fork_of_a_server = ForkContext(), _ForkServerContext()


class _OfThisProcess:
    """In the place of the module `multiprocessing`; its context forks, whichever is asked for."""

    @staticmethod
    def get_context(method: str | None = None) -> BaseContext:
        return _fork


class _OfAServer:
    """In the place of the module `multiprocessing`; its context asks a fork server."""

    @staticmethod
    def get_context(method: str | None = None) -> BaseContext:
        return _fork_of_a_server
