"""From vLLM's configuration to a catalog, once per process; and what cannot be served exactly, refused."""

from __future__ import annotations

import threading
from typing import Any

from vllm import envs

from steerserve.catalog import Catalog, build_catalog
from steerserve.config import HarvestPoints, SteerserveConfig, parse_config
from steerserve.errors import IncompatibleError
from steerserve.hookpoint import HookPoint
from steerserve.policy.enforcement import Enforcement
from steerserve.sae.hook import Hook
from steerserve.server.routing import CARRYING

__all__ = ["catalog_for", "check_engine", "config_for", "enforcement_for", "harvest_points"]

_enforcements: dict[tuple[object, ...], Enforcement] = {}
_catalogs: dict[tuple[object, ...], Catalog] = {}
# Two threads that start at once shall not open, and later watch and audit, everything twice.
_opening = threading.RLock()


def config_for(vllm_config: Any) -> SteerserveConfig | None:
    """The `steerserve` part of the engine's additional config, or None where there is none."""
    return parse_config(vllm_config.additional_config)


def catalog_for(vllm_config: Any) -> Catalog | None:
    """What this engine serves, opened once per process; None where steerserve is not configured.

    Raises: ConfigError or CheckpointError naming the entry that cannot be served.
    """
    config = config_for(vllm_config)
    if config is None:
        return None
    model = vllm_config.model_config
    key = _key(vllm_config, config)
    with _opening:
        if key not in _catalogs:
            _catalogs[key] = build_catalog(
                config,
                n_layers=model.get_total_num_hidden_layers(),
                d_model=model.get_hidden_size(),
                special_tokens=_special_tokens(model),
                stages=vllm_config.parallel_config.pipeline_parallel_size,
                vocab=model.get_vocab_size(),
                max_len=model.max_model_len,
            )
        return _catalogs[key]


def _key(vllm_config: Any, config: SteerserveConfig) -> tuple[object, ...]:
    """What a catalog depends on: engines of one process may differ in it.

    The length is the one that was asked for: what vLLM makes of it may shrink while it starts.
    """
    model, stages = vllm_config.model_config, vllm_config.parallel_config.pipeline_parallel_size
    return model.model, config.model_dump_json(), stages, model.original_max_model_len


def enforcement_for(vllm_config: Any) -> Enforcement | None:
    """The policies of this engine, once per process; None where no folder of policies is configured.

    Raises: PolicyError if they cannot be enforced: the server must not start.
    """
    config, catalog = config_for(vllm_config), catalog_for(vllm_config)
    if config is None or catalog is None or config.policies is None:
        return None
    key = _key(vllm_config, config)
    with _opening:
        if key not in _enforcements:
            _enforcements[key] = Enforcement(config.policies, catalog, CARRYING)
        return _enforcements[key]


def harvest_points(harvest: HarvestPoints, n_layers: int) -> dict[int, Hook]:
    """The hook points that are harvested: their indices, and the name that was given to each.

    Raises: ConfigError if the model has no such layer.
    """
    return {
        HookPoint.of(layer, harvest.hook, n_layers).index: Hook(layer, harvest.hook)
        for layer in harvest.layers
    }


def check_engine(vllm_config: Any) -> None:
    """Refuse what would make steering inexact, and a harvest of layers that the model has not.

    Raises: IncompatibleError saying which setting and why; ConfigError naming the layer.
    """
    config = config_for(vllm_config)
    if config is not None and config.harvest is not None:
        harvest_points(config.harvest, vllm_config.model_config.get_total_num_hidden_layers())
    reasons = [reason for holds, reason in _refusals(vllm_config) if holds]
    if reasons:
        raise IncompatibleError("steering cannot be served exactly with this engine: " + "; ".join(reasons))


def _refusals(vllm_config: Any) -> list[tuple[bool, str]]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    passes = vllm_config.compilation_config.pass_config
    speculative = vllm_config.speculative_config
    device, v2 = vllm_config.device_config.device_type, bool(vllm_config.use_v2_model_runner)
    config = config_for(vllm_config)
    resident = config is not None and any(sae.resident for sae in config.saes)
    harvests = config is not None and config.harvest is not None
    return [
        (envs.VLLM_USE_RUST_FRONTEND, "the Rust front end drops `steering` unread"),
        (model.runner_type != "generate", "the model does not generate"),
        (model.is_encoder_decoder, "encoder-decoder models have two streams"),
        (vllm_config.kv_transfer_config is not None, "a KV connector keys blocks without the plan"),
        (bool(getattr(passes, "enable_sp", False)), "sequence parallelism splits the stream between ranks"),
        (device not in ("cpu", "cuda"), f"there is no op for device type {device}"),
        (
            device != "cpu" and not v2,
            "on a GPU only the V2 model runner is steered (unset VLLM_USE_V2_MODEL_RUNNER)",
        ),
        (
            not v2 and bool(vllm_config.scheduler_config.async_scheduling),
            "the V1 model runner steers only without async scheduling (--no-async-scheduling)",
        ),
        (
            device != "cpu" and resident and not model.enforce_eager,
            "a resident SAE is encoded outside CUDA graphs (--enforce-eager)",
        ),
        (
            device != "cpu" and bool(model.enable_sleep_mode),
            "sleep mode may discard the rows that the slots hold",
        ),
        (
            device != "cpu" and harvests and vllm_config.compilation_config.cudagraph_mode.name != "NONE",
            "of what a CUDA graph replays, nothing can be harvested (cudagraph_mode NONE)",
        ),
        (
            harvests and parallel.data_parallel_size > 1,
            "data-parallel replicas would write the same shards (`steerserve harvest` starts one for each)",
        ),
        (
            v2 and speculative is not None and parallel.pipeline_parallel_size > 1,
            "under the V2 runner, a pipeline stage cannot tell rejected drafts from accepted ones",
        ),
        (
            getattr(vllm_config.scheduler_config, "scheduler_cls", None) is not None,
            "a scheduler of your own may not end the requests that a condition ends",
        ),
        (bool(getattr(parallel, "use_ubatching", False)), "micro-batching splits a step's tokens"),
        (
            parallel.decode_context_parallel_size * getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "context parallelism splits a request's tokens",
        ),
        (
            speculative is not None and speculative.method not in ("ngram", "ngram_gpu", None),
            "only n-gram speculation leaves the drafts to the steered model",
        ),
    ]


def _special_tokens(model_config: Any) -> set[int]:
    """Ids that the tokenizer calls special; without a tokenizer, those that the model's config names."""
    if not model_config.skip_tokenizer_init:
        from vllm.tokenizers import cached_tokenizer_from_config

        return set(cached_tokenizer_from_config(model_config).all_special_ids)
    named = (getattr(model_config.hf_config, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
    return {token for value in named if value is not None for token in _as_list(value)}


def _as_list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]
