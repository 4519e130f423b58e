"""How vLLM is started for a measurement: production's settings, with or without the plugin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .shapes import Served
from .workload import sae_name

__all__ = ["Setup", "core_environment", "vllm_setup"]

# Compiled, prefix caching on. Lengths are what the load needs.
_ENGINE: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "enable_prefix_caching": True,
    "gpu_memory_utilization": 0.2,
    "disable_log_stats": True,
    "seed": 0,
}


@dataclass(frozen=True)
class Setup:
    """A process to measure: its module, what its first line says, and variables of its own."""

    module: str
    options: dict[str, Any]
    environment: dict[str, str]


def core_environment(reserved_cores: int) -> dict[str, str]:
    """Variables of every vLLM: which cores compute, how much KV cache."""
    return {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": str(reserved_cores),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def vllm_setup(served: Served, hooked: int, environment: dict[str, str]) -> Setup:
    """vLLM with the first `hooked` SAEs of `served`; with none, it loads no plugin at all."""
    options = {"model": str(served.model), **_ENGINE, **served.engine}
    if hooked:
        saes = [{"name": sae_name(i), "path": str(path)} for i, path in enumerate(served.saes[:hooked])]
        options["additional_config"] = {"steerserve": {"saes": saes}}
    plugins = {"VLLM_PLUGINS": "steerserve" if hooked else ""}
    return Setup("benchmarks.engine", options, {**environment, **plugins})
