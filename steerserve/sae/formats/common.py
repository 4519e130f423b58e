"""What every layout does the same way: per-feature constants, and the checks against the manifest."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.files import check_finite, check_sha256, inside, map_safetensors, take
from steerserve.sae.manifest import STATS, Manifest, read_manifest
from steerserve.sae.mapped import MappedTensors
from steerserve.sae.reader import RowReader
from steerserve.sae.sae import Activation, Sae

__all__ = ["OPENED_WHOLE", "checked", "constant", "jump_relu", "rectifier"]

logger = logging.getLogger(__name__)

# Bytes of a file up to which it is hashed and scanned when it is opened, and mapped rather than read by row.
OPENED_WHOLE = 256 * 2**20


def constant(value: float, d_sae: int) -> Tensor:
    """[d_sae] float32, all equal, in the memory of one."""
    return torch.tensor(value).expand(d_sae)


def rectifier(d_sae: int) -> Activation:
    """f = max(z, 0): no threshold of its own."""
    return jump_relu(constant(-torch.inf, d_sae))


def jump_relu(threshold: Tensor) -> Activation:
    """f = max(z, 0) where z > θ. Args: threshold: [F], any float dtype."""
    d_sae = threshold.shape[0]
    zero = constant(0.0, d_sae)
    return Activation(threshold, constant(1.0, d_sae), zero, zero)


def checked(sae: Sae, folder: Path, tensors: Mapping[str, Tensor]) -> Sae:
    """The same SAE with its manifest and statistics, once the files are what they should be.

    Files the manifest vouches for are hashed; others are scanned for NaN and infinity, in bounded memory. Of
    files beyond OPENED_WHOLE bytes, only what belongs to no single feature is scanned now, and the rest as
    features are named; `verify_sae` checks them whole.

    Raises: CheckpointError if the manifest contradicts the files, or a weight is not finite.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        _compare(sae, manifest, folder)
        for name, expected in manifest.files.items():
            _check_hash(inside(folder, name), expected)
    if _is_large(sae.path):
        check_finite({k: part for k, part in tensors.items() if sae.d_sae not in part.shape}, sae.path)
        if isinstance(tensors, MappedTensors):
            sae = dataclasses.replace(sae, reader=RowReader(tensors))
    elif manifest is None or not manifest.finite:
        check_finite(tensors, sae.path)
    if manifest is None:
        return sae
    statistics = _statistics(folder, manifest)
    hook = sae.hook or manifest.place
    return dataclasses.replace(sae, manifest=manifest, statistics=statistics, hook=hook)


def _is_large(path: Path) -> bool:
    return path.stat().st_size > OPENED_WHOLE


def _compare(sae: Sae, manifest: Manifest, folder: Path) -> None:
    pairs: dict[str, tuple[object, object]] = {
        "architecture": (manifest.architecture, sae.architecture),
        "d_in": (manifest.d_in, sae.d_in),
        "d_sae": (manifest.d_sae, sae.d_sae),
        "hook": (manifest.place, sae.hook or manifest.place),
    }
    for key, (said, found) in pairs.items():
        if said != found:
            message = f"expected `{key}` {said} as in the manifest, got {found}"
            raise CheckpointError(message, path=sae.path)
    used = [sae.path.name] + [STATS] * (folder / STATS).exists()
    for name in used:
        if name not in manifest.files:
            raise CheckpointError("expected the manifest to list the file's sha256", path=folder / name)


def _check_hash(path: Path, expected: str) -> None:
    if _is_large(path):
        gib = path.stat().st_size / 2**30
        logger.warning(
            "%s: the sha256 of these %.1f GiB was not checked (`steerserve sae verify` does)", path, gib
        )
    else:
        check_sha256(path, expected)


def _statistics(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    if not (folder / STATS).exists():
        return {}
    path = inside(folder, STATS)
    tensors, _ = map_safetensors(path)
    check_finite(tensors, path)
    shape = (manifest.d_sae,)
    return {name: take(tensors, name, shape, path) for name in ("firing_rate", "max_activation")}
