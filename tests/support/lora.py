"""A small LoRA adapter with random weights, in PEFT's layout, and the same thing merged into a HF model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .models import D_MODEL, N_LAYERS

RANK, ALPHA = 8, 16
_NAME = "base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"


def make_adapter(folder: Path) -> Path:
    """Save an adapter of every layer's query projection."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(9)
    tensors: dict[str, Tensor] = {}
    for layer in range(N_LAYERS):
        for side, shape in (("A", (RANK, D_MODEL)), ("B", (D_MODEL, RANK))):
            name = _NAME.format(layer=layer, side=side)
            tensors[name] = torch.randn(shape, generator=generator) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@torch.no_grad()
def merge_adapter(model: nn.Module, folder: Path) -> None:
    """Add the adapter to a HF Llama's weights: W + (alpha / r)·B·A."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for layer in range(N_LAYERS):
        a, b = (tensors[_NAME.format(layer=layer, side=side)] for side in ("A", "B"))
        weight = model.get_submodule(f"model.layers.{layer}.self_attn.q_proj").weight
        weight += (ALPHA / RANK) * b @ a
