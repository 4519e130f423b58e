"""vLLM's own configuration objects for the small models, with a setting changed: what a refusal reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm.config import ParallelConfig, SpeculativeConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs

from .models import D_MODEL, N_LAYERS, VOCAB

__all__ = ["change", "engine_config", "parallel", "speculative", "write_config"]

_SIZES = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "vocab_size": VOCAB,
}


def engine_config(model: Path, **options: Any) -> VllmConfig:
    """As an engine that steerserve is configured for would make it. Args: options: of `EngineArgs`."""
    settings = {"additional_config": {"steerserve": {}}, "enforce_eager": True, "dtype": "float32"}
    return EngineArgs(model=str(model), **(settings | options)).create_engine_config()


def change(config: VllmConfig, dotted: str, value: Any) -> None:
    """Set a setting that exists, by its dotted name: `model_config.enable_sleep_mode`."""
    *owners, name = dotted.split(".")
    owner: Any = config
    for part in owners:
        owner = getattr(owner, part)
    assert hasattr(owner, name), f"{type(owner).__name__} has no {name}"
    setattr(owner, name, value)


def parallel(config: VllmConfig, **sizes: Any) -> None:
    """Give the configuration another way to share the work among ranks."""
    config.parallel_config = ParallelConfig(**sizes)


def speculative(config: VllmConfig, **settings: Any) -> None:
    """Give the configuration a way to speculate."""
    config.speculative_config = SpeculativeConfig(
        num_speculative_tokens=2,
        target_model_config=config.model_config,
        target_parallel_config=config.parallel_config,
        **settings,
    )


def write_config(folder: Path, architecture: str, model_type: str, **more: Any) -> Path:
    """Write a model's config.json and nothing else; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {"architectures": [architecture], "model_type": model_type}
    (folder / "config.json").write_text(json.dumps(named | _SIZES | more))
    return folder
