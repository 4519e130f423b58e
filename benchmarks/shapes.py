"""The models that are measured: the demo's, and random weights in the shape of Qwen2.5-0.5B or smaller."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from demo.zoo import LAYER
from steerserve.sae import open_sae

__all__ = ["SHAPES", "Served", "Shape", "prepare", "write_sae", "write_weights"]

DEMO = Path(__file__).parents[1] / "sae_weights" / "demo"
RANDOM_FEATURES = 4096


@dataclass(frozen=True)
class Shape:
    """A model to measure and how long one turn on it is.

    `config` is None for a model that lies in the checkout; otherwise it is written out and the weights are
    random.
    `layers` are those that get an SAE, the first one first.
    `targets` are the least ratios to stock vLLM that are aimed at, by variant.
    """

    name: str
    vocab: int
    d_model: int
    layers: tuple[int, ...]
    batches: int
    targets: dict[str, float]
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Served:
    """A shape on disk. `sae_kind` says whether its SAEs, one a layer, were trained or are random."""

    shape: Shape
    model: Path
    saes: tuple[Path, ...]
    d_sae: int
    sae_kind: str
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """What the results say of it; no paths of this machine."""
        shape = {name: value for name, value in asdict(self.shape).items() if name != "config"}
        shape["layers"] = self.shape.layers[: len(self.saes)]
        return {**shape, "d_sae": self.d_sae, "sae": self.sae_kind, "engine": self.engine}


_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "vocab_size": 151_936,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}
# Small enough for a look at whether everything runs, deep enough for every variant.
_TINY = _QWEN2 | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "max_position_embeddings": 1024,
    "vocab_size": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_STEERED = ("one", "many64", "reports64")
SHAPES = {
    "demo": Shape(
        name="demo",
        vocab=2048,
        d_model=256,
        layers=(LAYER,),
        batches=4,
        targets=dict.fromkeys(_STEERED, 0.90),
    ),
    "half-billion": Shape(
        name="half-billion",
        vocab=_QWEN2["vocab_size"],
        d_model=_QWEN2["hidden_size"],
        layers=(12, *range(4, 12), *range(13, 20)),
        batches=1,
        targets={"idle": 0.99, **dict.fromkeys(_STEERED, 0.98), "layers16": 0.95},
        config=_QWEN2,
    ),
    "tiny": Shape(
        name="tiny",
        vocab=_TINY["vocab_size"],
        d_model=_TINY["hidden_size"],
        layers=(8, *range(8), *range(9, 16)),
        batches=1,
        targets={},
        config=_TINY,
    ),
}


def prepare(shape: Shape, folder: Path, *, hooked: int = 1, d_sae: int = RANDOM_FEATURES) -> Served:
    """Put what a shape needs on disk, in `folder` where the checkout does not have it.

    Args:
        hooked: how many of the shape's layers get an SAE.
        d_sae: features of an SAE that is random.
    Raises: CheckpointError if the demo's SAE in the checkout is damaged.
    """
    saes: tuple[Path, ...] = (DEMO / "sae",)
    kind = "trained"
    if shape.config is not None or not saes[0].exists():
        layers, kind = shape.layers[:hooked], "random"
        saes = tuple(write_sae(folder / f"sae{layer}", shape.d_model, d_sae, layer) for layer in layers)
    model, engine = DEMO / "model", {}
    if shape.config is not None:
        model = folder / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(shape.config), encoding="utf-8")
        engine = {"load_format": "dummy", "skip_tokenizer_init": True}
    return Served(shape, model, saes, open_sae(saes[0]).d_sae, kind, {"dtype": "bfloat16", **engine})


def write_weights(served: Served) -> Served:
    """Random weights on disk beside the model's config, for two libraries to read the same ones."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(served.model)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(served.model)
    engine = {name: value for name, value in served.engine.items() if name != "load_format"}
    return replace(served, engine=engine)


def write_sae(folder: Path, d_model: int, d_sae: int, layer: int) -> Path:
    """A random JumpReLU SAE in SAELens' layout: unit decoder rows, about half of its features active."""
    generator = torch.Generator().manual_seed(layer)
    decoder = torch.nn.functional.normalize(torch.randn(d_sae, d_model, generator=generator), dim=1)
    tensors = {
        "W_enc": decoder.T.contiguous(),
        "W_dec": decoder,
        "b_enc": torch.zeros(d_sae),
        "b_dec": torch.zeros(d_model),
        "threshold": torch.full((d_sae,), 1e-3),
    }
    config = {
        "architecture": "jumprelu",
        "d_in": d_model,
        "d_sae": d_sae,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post", "sae_lens_version": "6.54.12"},
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
