"""What every layout does the same way: per-feature constants, and the checks against the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.files import check_finite, inside, map_safetensors, sha256_of, take
from steerserve.sae.manifest import STATS, Manifest, read_manifest
from steerserve.sae.sae import Activation, Sae

__all__ = ["checked", "jump_relu", "rectifier"]


def rectifier(d_sae: int) -> Activation:
    """f = max(z, 0): no threshold of its own."""
    return jump_relu(torch.full((d_sae,), -torch.inf))


def jump_relu(threshold: Tensor) -> Activation:
    """f = max(z, 0) where z > θ. Args: threshold: [F]."""
    zero = torch.zeros(threshold.shape[0])
    return Activation(threshold.float(), torch.ones_like(zero), zero, zero)


def checked(sae: Sae, folder: Path, tensors: Mapping[str, Tensor]) -> Sae:
    """The same SAE with its manifest and statistics, once the files are what they should be.

    Files the manifest vouches for are hashed; others are scanned for NaN and infinity, in bounded memory.

    Raises: CheckpointError if the manifest contradicts the files, or a weight is not finite.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        _compare(sae, manifest, folder)
        for name, expected in manifest.files.items():
            _check_hash(inside(folder, name), expected)
    if manifest is None or not manifest.finite:
        check_finite(tensors, sae.path)
    if manifest is None:
        return sae
    statistics = _statistics(folder, manifest)
    hook = sae.hook or manifest.place
    return dataclasses.replace(sae, manifest=manifest, statistics=statistics, hook=hook)


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
    if (found := sha256_of(path)) != expected:
        message = f"expected sha256 {expected} as in the manifest, got {found} (the file was changed since)"
        raise CheckpointError(message, path=path)


def _statistics(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    if not (folder / STATS).exists():
        return {}
    path = inside(folder, STATS)
    tensors, _ = map_safetensors(path)
    check_finite(tensors, path)
    shape = (manifest.d_sae,)
    return {name: take(tensors, name, shape, path).float() for name in ("firing_rate", "max_activation")}
