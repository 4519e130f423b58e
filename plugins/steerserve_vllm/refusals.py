"""The settings of vLLM's with which steering would not be exact.

What is read here stands in `compat.SETTINGS`, and is read as it is: a setting that a version of vLLM does not
have is an error at start-up, never a refusal that has gone silent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import vllm
from vllm import envs

from steerserve.config import SteerserveConfig, parse_config

from .compat import TENSOR_PARALLEL_MODELS, series

__all__ = ["refusals"]

Refusal = tuple[bool, str]

# With these, drafts are accepted that the steered model would not have sampled.
_LOSSY = ("synthetic", "fly")


def refusals(vllm_config: Any) -> list[Refusal]:
    """Whether each of the refusals holds, and what it says.

    Args: vllm_config: a `vllm.config.VllmConfig`.
    """
    config = parse_config(vllm_config.additional_config)
    found = (_of_engine, _of_runner, _of_parallel, _of_speculation)
    return [refusal for part in found for refusal in part(vllm_config, config)]


def _of_engine(vllm_config: Any, config: SteerserveConfig | None) -> Iterator[Refusal]:
    model = vllm_config.model_config
    yield envs.VLLM_USE_RUST_FRONTEND, "the Rust front end drops `steering` unread"
    yield model.runner_type != "generate", "the model does not generate"
    yield model.is_encoder_decoder, "encoder-decoder models have two streams"
    yield vllm_config.kv_transfer_config is not None, "a KV connector keys blocks without the plan"
    yield (
        vllm_config.cache_config.kv_sharing_fast_prefill,
        "fast prefill leaves out tokens of a prompt in later layers (--kv-sharing-fast-prefill)",
    )
    yield (
        vllm_config.scheduler_config.scheduler_cls is not None,
        "a scheduler of your own may not end the requests that a condition ends",
    )
    yield _prefetches(vllm_config.offload_config), "offloading with prefetch replaces the layers' forward"
    yield (
        _decodes_elsewhere(vllm_config),
        "kernels that decode whole layers leave out what is hooked behind them (monokernel, decode_backend)",
    )


def _prefetches(offload: Any) -> bool:
    return bool(offload.offload_backend == "prefetch" or offload.prefetch.offload_group_size > 0)


def _decodes_elsewhere(vllm_config: Any) -> bool:
    """Whether a model may run decode steps by another path than its layers, which the guard never sees."""
    if vllm_config.additional_config.get("decode_backend") is not None:
        return True
    if series(vllm.__version__) == "0.32":
        return bool(envs.VLLM_ROCM_MONO_DECODE)
    return bool(vllm_config.kernel_config.monokernel)


def _of_runner(vllm_config: Any, config: SteerserveConfig | None) -> Iterator[Refusal]:
    model = vllm_config.model_config
    device, v2 = vllm_config.device_config.device_type, bool(vllm_config.use_v2_model_runner)
    resident = config is not None and any(sae.resident for sae in config.saes)
    harvests = config is not None and config.harvest is not None
    yield device not in ("cpu", "cuda"), f"there is no op for device type {device}"
    yield (
        device != "cpu" and not v2,
        "on a GPU only the V2 model runner is steered (unset VLLM_USE_V2_MODEL_RUNNER)",
    )
    yield (
        not v2 and bool(vllm_config.scheduler_config.async_scheduling),
        "the V1 model runner steers only without async scheduling (--no-async-scheduling)",
    )
    yield (
        device != "cpu" and resident and not model.enforce_eager,
        "a resident SAE is encoded outside CUDA graphs (--enforce-eager)",
    )
    yield (
        device != "cpu" and bool(model.enable_sleep_mode),
        "sleep mode may discard the rows that the slots hold",
    )
    yield (
        device != "cpu" and harvests and vllm_config.compilation_config.cudagraph_mode.name != "NONE",
        "of what a CUDA graph replays, nothing can be harvested (cudagraph_mode NONE)",
    )
    yield (
        harvests and vllm_config.parallel_config.data_parallel_size > 1,
        "data-parallel replicas would write the same shards (`steerserve harvest` starts one for each)",
    )


def _of_parallel(vllm_config: Any, config: SteerserveConfig | None) -> Iterator[Refusal]:
    parallel, ranks = vllm_config.parallel_config, vllm_config.parallel_config.tensor_parallel_size
    yield (
        parallel.use_sequence_parallel_moe,
        "sequence-parallel experts split the stream between ranks (expert with tensor and data parallelism)",
    )
    yield (
        parallel.enable_hc_sp and ranks > 1,
        "sequence parallelism splits the stream between ranks (--enable-hc-sp)",
    )
    yield parallel.use_ubatching, "micro-batching splits a step's tokens"
    yield (
        parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1,
        "context parallelism splits a request's tokens",
    )
    architecture = vllm_config.model_config.architecture
    yield (
        ranks > 1 and architecture in TENSOR_PARALLEL_MODELS,
        f"{architecture} with tensor parallelism: {TENSOR_PARALLEL_MODELS.get(architecture)}",
    )


def _of_speculation(vllm_config: Any, config: SteerserveConfig | None) -> Iterator[Refusal]:
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    yield (
        bool(vllm_config.use_v2_model_runner) and vllm_config.parallel_config.pipeline_parallel_size > 1,
        "under the V2 runner, a pipeline stage cannot tell rejected drafts from accepted ones",
    )
    yield (
        speculative.method not in ("ngram", "ngram_gpu"),
        "only n-gram speculation leaves the drafts to the steered model",
    )
    yield (
        speculative.rejection_sample_method in _LOSSY,
        f"{speculative.rejection_sample_method} rejection sampling accepts drafts that steering rules out",
    )
