"""From vLLM's configuration to a catalog, once per process; and what cannot be served exactly, refused."""

from __future__ import annotations

from typing import Any

from vllm import envs

from steerserve.catalog import Catalog, build_catalog
from steerserve.config import SteerserveConfig, parse_config
from steerserve.errors import IncompatibleError

__all__ = ["catalog_for", "check_engine", "config_for"]

_catalogs: dict[tuple[str, str], Catalog] = {}


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
    key = (model.model, config.model_dump_json())
    if key not in _catalogs:
        _catalogs[key] = build_catalog(
            config,
            n_layers=model.get_total_num_hidden_layers(),
            d_model=model.get_hidden_size(),
            special_tokens=_special_tokens(model),
        )
    return _catalogs[key]


def check_engine(vllm_config: Any) -> None:
    """Refuse what would make steering inexact.

    Raises: IncompatibleError saying which setting and why.
    """
    reasons = [reason for holds, reason in _refusals(vllm_config) if holds]
    if reasons:
        raise IncompatibleError("steering cannot be served exactly with this engine: " + "; ".join(reasons))


def _refusals(vllm_config: Any) -> list[tuple[bool, str]]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    passes = vllm_config.compilation_config.pass_config
    speculative = vllm_config.speculative_config
    return [
        (envs.VLLM_USE_RUST_FRONTEND, "the Rust front end drops `steering` unread"),
        (model.runner_type != "generate", "the model does not generate"),
        (model.is_encoder_decoder, "encoder-decoder models have two streams"),
        (vllm_config.kv_transfer_config is not None, "a KV connector keys blocks without the plan"),
        (bool(getattr(passes, "enable_sp", False)), "sequence parallelism splits the stream between ranks"),
        (bool(vllm_config.use_v2_model_runner), "the V2 model runner is not supported yet"),
        (vllm_config.device_config.device_type != "cpu", "only the CPU op is built so far"),
        (vllm_config.scheduler_config.async_scheduling, "async scheduling is not supported yet"),
        (bool(getattr(parallel, "use_ubatching", False)), "micro-batching splits a step's tokens"),
        (parallel.decode_context_parallel_size > 1, "context parallelism splits a request's tokens"),
        (
            speculative is not None and speculative.method not in ("ngram", None),
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
