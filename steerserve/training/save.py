"""A trained SAE on disk: SAELens' layout, which SAELens itself reloads, plus our manifest and statistics."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from steerserve.sae import Hook, Manifest, open_sae, write_manifest
from steerserve.sae.files import check_finite, sha256_of, write_safetensors
from steerserve.sae.manifest import STATS, HookEntry

from .evaluate import Evaluation, evaluate
from .settings import TrainSettings
from .shard_file import ShardHeader
from .trainer import Trained

__all__ = ["save_inference_sae", "save_trained"]

WEIGHTS = "sae_weights.safetensors"
# The version of SAELens whose layout this is; SAELens reads it to know which defaults apply.
_LAYOUT = "6.54.12"


def save_inference_sae(folder: Path, trained: Trained, settings: TrainSettings, header: ShardHeader) -> None:
    """Write `cfg.json` and `sae_weights.safetensors`: a jumprelu SAE with one threshold for all features.

    The input scale s is folded so that activations come out in the model's own scale and decoder rows keep
    unit norm: x̂ = Σ f_j·d_j + b_dec with f_j the length of feature j in the residual stream.

    Raises: CheckpointError if a weight is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    p, scale = trained.parameters, trained.scale
    tensors = {
        "W_dec": p.decoder.contiguous(),
        "W_enc": p.encoder.T.contiguous(),
        "b_dec": p.b_dec / scale,
        "b_enc": p.bias / scale,
        "threshold": torch.full_like(p.bias, trained.threshold / scale),
    }
    check_finite(tensors, folder / WEIGHTS)
    write_safetensors(folder / WEIGHTS, tensors)
    (folder / "cfg.json").write_text(json.dumps(_config(p.encoder, settings, header), indent=1) + "\n")


def save_trained(
    folder: Path, trained: Trained, settings: TrainSettings, header: ShardHeader, held_out: Iterable[Tensor]
) -> Evaluation:
    """Write the SAE, open it again as a server would, evaluate it, and record what was found beside it.

    Args: folder: a new folder. header: of the shards. held_out: [n, d_in] batches not trained on.
    Returns: the evaluation, which is also in `manifest.json` and `stats.safetensors`.
    """
    save_inference_sae(folder, trained, settings, header)
    found = evaluate(open_sae(folder), held_out)
    statistics = {"firing_rate": found.firing_rate, "max_activation": found.max_activation}
    write_safetensors(folder / STATS, statistics)
    names = ("cfg.json", WEIGHTS, STATS)
    manifest = Manifest(
        model=header.model,
        hook=HookEntry(layer=header.hook.layer, site=header.hook.site),
        d_in=header.d_in,
        d_sae=settings.d_sae,
        architecture="batchtopk",
        files={name: sha256_of(folder / name) for name in names},
        finite=True,
        training={**found.numbers(), "k": settings.k, "seed": settings.seed, "tokens": settings.tokens},
    )
    write_manifest(folder, manifest)
    return found


def _config(encoder: Tensor, settings: TrainSettings, header: ShardHeader) -> dict[str, object]:
    hook = Hook(header.hook.layer, header.hook.site)
    metadata = {
        "sae_lens_version": _LAYOUT,
        "hook_name": hook.name,
        "model_name": header.model.name,
        "training_architecture": "batchtopk",
        "training_architecture_details": settings.model_dump(),
    }
    return {
        "architecture": "jumprelu",
        "d_in": encoder.shape[1],
        "d_sae": encoder.shape[0],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
