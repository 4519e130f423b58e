"""What every layout does the same way: per-feature constants, hooks, and the checks against the manifest."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.files import check_finite, check_sha256, inside, map_safetensors, take
from steerserve.sae.hook import Hook, parse_hook
from steerserve.sae.manifest import STATS, Manifest, read_manifest
from steerserve.sae.mapped import MappedTensors
from steerserve.sae.reader import RowReader
from steerserve.sae.sae import Activation, Sae, Stored

__all__ = [
    "OPENED_WHOLE",
    "TOP_K",
    "checked",
    "constant",
    "expect_only",
    "gated",
    "jump_relu",
    "matrix_shape",
    "rectifier",
    "row_norms",
    "stored",
    "stream",
]

logger = logging.getLogger(__name__)

# Bytes of a file up to which it is hashed and scanned when it is opened, and mapped rather than read by row.
OPENED_WHOLE = 256 * 2**20

TOP_K = "its exact top-k compares all features of a token"
_CHUNK = 4096
_NUMBERS_AT_ONCE = 2**22
_LONGEST_NAME = 256


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


def gated(gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> Activation:
    """f = max(e^r·z' + b_mag, 0) where z' + gate > 0, with z' the encoder's product without any bias.

    One product serves both paths: magnitude = s·(z − gate) + b_mag with z = z' + gate, the gate's
    pre-activation, which is what the activation formula sees. Args: [F] each, any float dtype.
    """
    gate, scale = gate.float(), r_mag.float().exp()
    zero = constant(0.0, gate.shape[0])
    return Activation(zero, scale, b_mag.float() - scale * gate, zero)


def stored(
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor,
    b_dec: Tensor,
    *,
    subtracts_b_dec: bool,
    input_scale: float = 1.0,
    output_scale: float | None = None,
) -> Stored:
    """Weights without a scale per feature: f = act(W·s·(x [− b_dec/t]) + b), x̂ = (f·D + b_dec)/t.

    Args:
        encoder, decoder: [F, d], views of the mapped file. bias: [F]. b_dec: [d].
        input_scale: s. output_scale: t; None for the same as s.
    """
    d_sae = decoder.shape[0]
    out = input_scale if output_scale is None else output_scale
    b_dec = b_dec.float()
    return Stored(
        encoder=encoder,
        decoder=decoder,
        bias=bias,
        pre_bias=b_dec * (input_scale / out) if subtracts_b_dec else None,
        b_dec=b_dec / out,
        encoder_scale=constant(1.0, d_sae),
        decoder_scale=constant(input_scale / out, d_sae),
        input_scale=input_scale,
    )


def stream(name: str) -> tuple[Hook | None, str | None]:
    """The hook that a place's name means, or why an SAE that was trained there is not served."""
    hook = parse_hook(name) if len(name) <= _LONGEST_NAME else None
    shown = name[:_LONGEST_NAME]
    return hook, None if hook else f"it reads `{shown}`, not the residual stream: not served"


def expect_only(tensors: Mapping[str, Tensor], known: Collection[str], what: str, path: Path) -> None:
    """Refuse a tensor whose meaning nobody knows. Args: what: the kind of SAE, for the message.

    Raises: CheckpointError naming the first such tensor.
    """
    for name in sorted(set(tensors) - set(known)):
        raise CheckpointError(f"expected no such tensor in {what}", path=path, tensor=name)


def matrix_shape(tensors: Mapping[str, Tensor], name: str, path: Path) -> tuple[int, int]:
    """The shape of the matrix `name`. Raises: CheckpointError if it is missing, no matrix, or empty."""
    tensor = tensors.get(name)
    if tensor is None or tensor.ndim != 2 or tensor.numel() == 0:
        got = f"shape {list(tensor.shape)}" if tensor is not None else f"tensors {sorted(tensors)[:20]}"
        raise CheckpointError(f"expected a matrix, got {got}", path=path, tensor=name)
    return tensor.shape[0], tensor.shape[1]


def row_norms(matrix: Tensor) -> Tensor:
    """[F] float32, the norms of the rows of a mapped [F, d], read in its own order and never copied whole."""
    if matrix.stride(0) >= matrix.stride(1):
        return torch.cat([part.float().norm(dim=1) for part in torch.split(matrix, _CHUNK)])
    squares = torch.zeros(matrix.shape[0], dtype=torch.float64)
    step = max(1, _NUMBERS_AT_ONCE // matrix.shape[0])
    for part in torch.split(matrix, step, dim=1):
        squares += part.float().square().sum(dim=1)
    return squares.sqrt().float()


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
