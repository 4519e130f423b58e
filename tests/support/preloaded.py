"""Imports what an engine and a server of vLLM use, for the processes that are forked from this one."""

import gc

import vllm.entrypoints.cli.main
import vllm.entrypoints.launchers.api_server.entry
import vllm.model_executor.models.llama
import vllm.v1.engine.async_llm
import vllm.v1.engine.core
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_worker  # noqa: F401

import steerserve_vllm.admission
import steerserve_vllm.attach
import steerserve_vllm.endpoint
import steerserve_vllm.front_end
import steerserve_vllm.vllm_command  # noqa: F401
from tests.support.forking import fork_engines

fork_engines(here=True)
# Nothing that was imported is looked at by the collectors of the forks.
gc.freeze()
