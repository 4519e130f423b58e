"""Small random SAEs, made and saved by SAELens itself; kinds that it does not know, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

from .models import D_MODEL
from .plain import PLAIN, Plain

D_SAE = 128
_KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "standard": (StandardSAE, StandardSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    "gated": (GatedSAE, GatedSAEConfig),
    # What SAELens exports of a trained BatchTopK SAE.
    "batchtopk": (JumpReLUSAE, JumpReLUSAEConfig),
    "topk": (TopKSAE, TopKSAEConfig),
}


def make_sae(
    folder: Path,
    architecture: str,
    layer: int,
    *,
    seed: int = 0,
    site: str = "resid_post",
    d_in: int = D_MODEL,
    d_sae: int = D_SAE,
    **settings: Any,
) -> Path:
    """Save a random SAE of `architecture` at a hook; every bias and threshold is non-zero.

    `settings` go to SAELens' config: `k` and `rescale_acts_by_decoder_norm` of "topk",
    `normalize_activations` of any.
    """
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.hook_{site}", model_name="tiny")
    if architecture == "batchtopk":
        metadata.training_architecture = "batchtopk"
    if architecture == "topk":
        settings = {"k": 8, **settings}
    sae_class, config_class = _KINDS[architecture]
    config = {"d_in": d_in, "d_sae": d_sae, "apply_b_dec_to_input": seed % 2 == 0, "metadata": metadata}
    sae = sae_class(config_class(**{**config, **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            scale = 0.2 if name.startswith("W_") else 0.1
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise.abs() if name == "threshold" else noise)
    sae.save_model(str(folder))
    return folder


def load_sae(folder: Path) -> Any:
    """Load it back with SAELens, or as its paper's plain formula where SAELens does not know it."""
    if json.loads((folder / "cfg.json").read_text())["architecture"] in PLAIN:
        return Plain(folder)
    return SAE.load_from_disk(str(folder), device="cpu")


def make_trained(
    folder: Path,
    architecture: str,
    layer: int,
    *,
    seed: int = 0,
    d_in: int = D_MODEL,
    d_sae: int = D_SAE,
    k: int = 8,
    parts: tuple[int, int] = (4, 4),
) -> Path:
    """Save a random switch, kron or vaease SAE as our trainer does; no number is zero.

    Args: parts: of a switch SAE its experts (the first number); of a kron SAE base and extension.
    """
    base, extension = parts
    heads = d_sae // (base * extension)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "kron": {
            "W_left": (d_in, heads * base),
            "W_right": (d_in, heads * extension),
            "b_left": (heads * base,),
            "b_right": (heads * extension,),
        },
        "switch": {"W_enc": (d_in, d_sae), "W_router": (base, d_in), "b_router": (d_in,)},
        "vaease": {"W_enc": (d_in, d_sae), "W_gate": (d_in, d_sae), "b_enc": (d_sae,), "b_gate": (d_sae,)},
    }
    sizes: dict[str, dict[str, int]] = {
        "kron": {"heads": heads, "base": base, "extension": extension, "k": k},
        "switch": {"experts": base, "k": k},
        "vaease": {},
    }
    generator = torch.Generator().manual_seed(seed)
    wanted: dict[str, tuple[int, ...]] = {"W_dec": (d_sae, d_in), "b_dec": (d_in,), **shapes[architecture]}
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.2 if name.startswith("W_") else 0.1)
        for name, shape in wanted.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    metadata = {"hook_name": f"blocks.{layer}.hook_resid_post", "model_name": "tiny"}
    config = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, **sizes[architecture]}
    (folder / "cfg.json").write_text(json.dumps({**config, "metadata": metadata}))
    return folder


def make_switch(
    folder: Path,
    layer: int,
    *,
    seed: int = 0,
    d_in: int = D_MODEL,
    d_sae: int = D_SAE,
    experts: int = 4,
    k: int = 8,
    heaviside: bool = False,
) -> Path:
    """Save a random Switch SAE as its authors' trainer does: `config.json` and `ae.pt`."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_in),
        "router.weight": (experts, d_in),
        "decoder": (d_sae, d_in),
    }
    shapes |= {"b_dec": (d_in,), "b_router": (d_in,)}
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    trainer = {"dict_class": "SwitchAutoEncoder", "activation_dim": d_in, "dict_size": d_sae, "k": k}
    trainer |= {"experts": experts, "heaviside": heaviside, "layer": layer, "lm_name": "tiny"}
    (folder / "config.json").write_text(json.dumps({"trainer": {**trainer, "submodule_name": None}}))
    return folder
