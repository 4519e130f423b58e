"""SAELens' folders, version 6 and older: `cfg.json` and `sae_weights.safetensors`.

Semantics are those of sae_lens 6.54 (`SAE.process_sae_in`, `encode`, `decode`): x − b_dec only if
`apply_b_dec_to_input`, and batchtopk and matryoshka exported as jumprelu.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.files import inside, map_safetensors, read_json, take
from steerserve.sae.sae import Activation, Sae, Stored

from .common import checked, constant, expect_only, gated, jump_relu, rectifier, row_norms
from .saelens_config import Config, read_config

__all__ = ["CONFIG", "WEIGHTS", "open_saelens"]

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"

_COMMON = {"W_dec", "W_enc", "b_dec"}
# Written by SAELens < 6: a factor per feature that its finetuning put between activation and decoder.
_FINETUNING = {"finetuning_scaling_factor", "scaling_factor"}


@dataclass(frozen=True)
class _File:
    """The tensors of one weights file, taken by name with their shapes checked."""

    path: Path
    tensors: Mapping[str, Tensor]
    config: Config

    def vector(self, name: str) -> Tensor:
        """[d_sae], a view of the mapped file."""
        return take(self.tensors, name, (self.config.d_sae,), self.path)


def open_saelens(folder: Path) -> Sae:
    """Open an SAE that SAELens saved.

    Args: folder: an existing folder, with symlinks resolved.
    Raises: CheckpointError if a file is damaged or contradicts `cfg.json`, or the architecture is not served.
    """
    config = read_config(inside(folder, CONFIG))
    path = inside(folder, WEIGHTS)
    tensors, _ = map_safetensors(path)
    file = _File(path, tensors, config)
    build, names = _ARCHITECTURES[config.architecture]
    what = f"an SAE of architecture {config.architecture}"
    expect_only(tensors, _COMMON | names | _FINETUNING, what, path)
    bias, activation = build(file)
    scale, refusal = _input_scale(folder, file)
    sae = Sae(
        architecture=config.trained_as,
        d_in=config.d_in,
        d_sae=config.d_sae,
        hook=config.hook,
        path=path,
        stored=_stored(file, bias, scale),
        activation=activation,
        refusal=config.refusal or refusal,
        needs_resident=config.needs_resident,
        top_k=config.k,
        normalisation=config.normalisation,
    )
    return checked(sae, folder, tensors)


def _stored(file: _File, bias: Tensor, input_scale: float) -> Stored:
    config = file.config
    b_dec = take(file.tensors, "b_dec", (config.d_in,), file.path).float()
    encoder = take(file.tensors, "W_enc", (config.d_in, config.d_sae), file.path).T
    decoder = take(file.tensors, "W_dec", (config.d_sae, config.d_in), file.path)
    encoder_scale, decoder_scale = constant(1.0, config.d_sae), _finetuning_factor(file)
    if config.rescale_acts_by_decoder_norm:
        # Only top-k SAEs are ever rescaled: selection on pre·‖d‖, then decoding by d/‖d‖.
        encoder_scale = row_norms(decoder).clamp(min=1e-8)
        decoder_scale = decoder_scale / encoder_scale
    return Stored(
        encoder=encoder,
        decoder=decoder,
        bias=bias,
        pre_bias=b_dec if config.apply_b_dec_to_input else None,
        b_dec=b_dec / input_scale,
        encoder_scale=encoder_scale,
        decoder_scale=decoder_scale,
        input_scale=input_scale,
    )


def _finetuning_factor(file: _File) -> Tensor:
    ones = constant(1.0, file.config.d_sae)
    for name in sorted(_FINETUNING & set(file.tensors)):
        if file.tensors[name].numel() == 1 < file.config.d_sae:
            continue
        factor = file.vector(name).float()
        if torch.allclose(factor, ones):
            continue
        if not file.config.finetuning_scaling_factor:
            message = "expected all ones, because `finetuning_scaling_factor` is false"
            raise CheckpointError(message, path=file.path, tensor=name)
        return factor
    return ones


def _input_scale(folder: Path, file: _File) -> tuple[float, str | None]:
    """The scalar that the SAE's input is multiplied by, or why the normalisation cannot be served."""
    if file.config.normalize_activations != "expected_average_only_in":
        return 1.0, None
    scale = _stored_scale(folder, file.tensors)
    if scale is None:
        return 1.0, (
            "expected the scaling factor of normalize_activations expected_average_only_in in "
            f"`{SCALER}` or a scalar tensor `scaling_factor`, found none: not served, for it would be a guess"
        )
    if not 0.0 < scale < float("inf"):
        raise CheckpointError(f"expected a positive scaling factor, got {scale}", path=file.path)
    return scale, None


def _stored_scale(folder: Path, tensors: Mapping[str, Tensor]) -> float | None:
    if (folder / SCALER).exists():
        path = inside(folder, SCALER)
        value = read_json(path).get("scaling_factor")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"expected a number as `scaling_factor`, got {value!r}", path=path)
        return float(value)
    scalar = tensors.get("scaling_factor")
    return float(scalar) if scalar is not None and scalar.numel() == 1 else None


def _standard(file: _File) -> tuple[Tensor, Activation]:
    return file.vector("b_enc"), rectifier(file.config.d_sae)


def _jumprelu(file: _File) -> tuple[Tensor, Activation]:
    return file.vector("b_enc"), jump_relu(file.vector("threshold"))


def _gated(file: _File) -> tuple[Tensor, Activation]:
    gate = file.vector("b_gate").float()
    return gate, gated(gate, file.vector("r_mag"), file.vector("b_mag"))


_Build = Callable[[_File], tuple[Tensor, Activation]]
_ARCHITECTURES: dict[str, tuple[_Build, set[str]]] = {
    "gated": (_gated, {"b_gate", "b_mag", "r_mag"}),
    "jumprelu": (_jumprelu, {"b_enc", "threshold"}),
    "standard": (_standard, {"b_enc"}),
    "topk": (_standard, {"b_enc"}),
}
