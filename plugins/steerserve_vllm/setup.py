"""From vLLM's configuration to a catalog, once per process; and what cannot be served exactly, refused."""

from __future__ import annotations

import threading
from typing import Any

from steerserve.catalog import Catalog, build_catalog
from steerserve.config import HarvestPoints, SteerserveConfig, parse_config
from steerserve.errors import IncompatibleError
from steerserve.hookpoint import HookPoint
from steerserve.policy.enforcement import Enforcement
from steerserve.sae.hook import Hook
from steerserve.server.routing import CARRYING

from .refusals import refusals

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
    reasons = [reason for holds, reason in refusals(vllm_config) if holds]
    if reasons:
        raise IncompatibleError("steering cannot be served exactly with this engine: " + "; ".join(reasons))


def _special_tokens(model_config: Any) -> set[int]:
    """Ids that the tokenizer calls special; without a tokenizer, those that the model's config names."""
    if not model_config.skip_tokenizer_init:
        from vllm.tokenizers import cached_tokenizer_from_config

        return set(cached_tokenizer_from_config(model_config).all_special_ids)
    named = (getattr(model_config.hf_config, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
    return {token for value in named if value is not None for token in _as_list(value)}


def _as_list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]
