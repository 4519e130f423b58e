"""A trained SAE on disk: SAELens' layout, which SAELens itself reloads, plus our manifest and statistics."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from steerserve.sae import Hook, Manifest, open_sae, write_manifest
from steerserve.sae.architectures import Export
from steerserve.sae.files import check_finite, sha256_of, write_safetensors
from steerserve.sae.manifest import STATS, HookEntry
from steerserve.sae.resident import Resident

from .evaluate import Evaluation, evaluate
from .settings import TrainSettings
from .shard_file import ShardHeader
from .trainer import Trained

__all__ = ["save_inference_sae", "save_trained"]

WEIGHTS = "sae_weights.safetensors"
# The version of SAELens whose layout this is; SAELens reads it to know which defaults apply.
_LAYOUT = "6.54.12"


def save_inference_sae(folder: Path, trained: Trained, settings: TrainSettings, header: ShardHeader) -> None:
    """Write `cfg.json` and `sae_weights.safetensors`, in the model's own scale.

    Raises: CheckpointError if a weight is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    export = trained.sae.export(trained.scale)
    check_finite(export.tensors, folder / WEIGHTS)
    write_safetensors(folder / WEIGHTS, export.tensors)
    config = _config(trained, export, settings, header)
    (folder / "cfg.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def save_trained(
    folder: Path, trained: Trained, settings: TrainSettings, header: ShardHeader, held_out: Iterable[Tensor]
) -> Evaluation:
    """Write the SAE, open it again as a server would, evaluate it, and record what was found beside it.

    Args: folder: a new folder. header: of the shards. held_out: [n, d_in] batches not trained on.
    Returns: the evaluation, which is also in `manifest.json` and `stats.safetensors`.
    """
    save_inference_sae(folder, trained, settings, header)
    sae = open_sae(folder)
    found = evaluate(sae if sae.per_feature else Resident.of(sae), held_out)
    statistics = {"firing_rate": found.firing_rate, "max_activation": found.max_activation}
    write_safetensors(folder / STATS, statistics)
    names = ("cfg.json", WEIGHTS, STATS)
    manifest = Manifest(
        model=header.model,
        hook=HookEntry(layer=header.hook.layer, site=header.hook.site),
        d_in=header.d_in,
        d_sae=settings.d_sae,
        architecture=sae.architecture,
        files={name: sha256_of(folder / name) for name in names},
        finite=True,
        training={**found.numbers(), "seed": settings.seed, "tokens": settings.tokens, **_numbers(settings)},
    )
    write_manifest(folder, manifest)
    return found


def _numbers(settings: TrainSettings) -> dict[str, float | int]:
    """The architecture's own settings, as far as they are numbers."""
    values = settings.options.model_dump()
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def _config(trained: Trained, export: Export, settings: TrainSettings, header: ShardHeader) -> dict[str, Any]:
    hook = Hook(header.hook.layer, header.hook.site)
    metadata = {
        "sae_lens_version": _LAYOUT,
        "hook_name": hook.name,
        "model_name": header.model.name,
        "training_architecture": trained.sae.exported_as,
        "training_architecture_details": settings.flat(),
    }
    return {
        **export.config,
        "d_in": trained.sae.d_in,
        "d_sae": trained.sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
