"""A small catalog written by hand, where SAELens is not installed: a feature of every kind of activation."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from steerserve.catalog import Catalog, build_catalog
from steerserve.config import DirectionConfig, SaeConfig, SteerserveConfig
from steerserve.sae import Direction, Hook, write_direction

__all__ = ["FEATURES", "LAYERS", "small_catalog"]

LAYERS, FEATURES = 4, 128
# Name, architecture in SAELens' layout, and the layer that it is hooked behind.
_SAES = [("jump", "jumprelu", 2), ("gate", "gated", 2), ("std", "standard", 1)]
_FURTHER = {"jumprelu": ["b_enc", "threshold"], "gated": ["b_gate", "b_mag", "r_mag"], "standard": ["b_enc"]}


def small_catalog(folder: Path, width: int) -> Catalog:
    """SAEs `jump` and `gate` at resid_post.2, `std` at resid_post.1, and direction `north` at resid_post.2.

    Args:
        folder: where they are written.
        width: d_model.
    """
    unit = torch.nn.functional.normalize(torch.ones(width), dim=0)
    write_direction(folder / "north.safetensors", Direction("north", unit, Hook(2, "resid_post")))
    for seed, (name, architecture, layer) in enumerate(_SAES):
        _write(folder / name, architecture, layer, width, seed)
    config = SteerserveConfig(
        saes=[SaeConfig(name=name, path=folder / name) for name, _, _ in _SAES],
        directions=[DirectionConfig(name="north", path=folder / "north.safetensors")],
    )
    return build_catalog(config, n_layers=LAYERS, d_model=width, special_tokens=[0, 1, 2])


def _write(folder: Path, architecture: str, layer: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int, std: float) -> torch.Tensor:
        return torch.randn(size, generator=generator) * std

    tensors = {
        "W_enc": drawn(width, FEATURES, std=width**-0.5),
        "W_dec": drawn(FEATURES, width, std=width**-0.5),
        "b_dec": drawn(width, std=0.1),
    }
    tensors |= {name: drawn(FEATURES, std=0.2).abs() for name in _FURTHER[architecture]}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": architecture,
        "d_in": width,
        "d_sae": FEATURES,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post", "model_name": "small"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
