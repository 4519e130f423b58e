"""Small random SAEs, made and saved by SAELens itself."""

from __future__ import annotations

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
)
from sae_lens.saes.sae import SAEMetadata

from .models import D_MODEL

D_SAE = 128
_KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "standard": (StandardSAE, StandardSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    "gated": (GatedSAE, GatedSAEConfig),
    # What SAELens exports of a trained BatchTopK SAE.
    "batchtopk": (JumpReLUSAE, JumpReLUSAEConfig),
}


def make_sae(folder: Path, architecture: str, layer: int, *, seed: int = 0, site: str = "resid_post") -> Path:
    """Save a random SAE of `architecture` at a hook; every bias and threshold is non-zero."""
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.hook_{site}", model_name="tiny")
    if architecture == "batchtopk":
        metadata.training_architecture = "batchtopk"
    sae_class, config_class = _KINDS[architecture]
    sae = sae_class(
        config_class(d_in=D_MODEL, d_sae=D_SAE, apply_b_dec_to_input=seed % 2 == 0, metadata=metadata)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            scale = 0.2 if name.startswith("W_") else 0.1
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise.abs() if name == "threshold" else noise)
    sae.save_model(str(folder))
    return folder


def load_sae(folder: Path) -> SAE[Any]:
    """Load it back with SAELens."""
    return SAE.load_from_disk(str(folder), device="cpu")
