"""OpenMOSS' files of today (lm_saes): `config.json` and `sae_weights.safetensors`, JumpReLU per feature.

    pre = (s·x) @ W_E + b_E,  f_j = pre_j where pre_j·‖d_j‖ > exp(log θ_j),  x̂ = (f @ W_D + b_D)/s

with s = √d / average norm, the norm lying among the tensors (`dataset_average_activation_norm.<hook>`). This
is the function that was trained. (lm_saes' own folding of s leaves the threshold as it was.)

Source: github.com/OpenMOSS/Language-Model-SAEs, `src/lm_saes/models/sae.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.files import check_finite, inside, map_safetensors, take
from steerserve.sae.sae import Activation, Sae

from . import lm_saes
from .common import checked, expect_only, jump_relu, matrix_shape, rectifier, stored
from .fields import Fields
from .lm_saes import Scales

__all__ = ["CONFIG", "WEIGHTS", "open_openmoss"]

CONFIG = "config.json"
WEIGHTS = "sae_weights.safetensors"

_NORM = "dataset_average_activation_norm."
_LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
_GLU = {"W_E_glu", "b_E_glu"}
_TENSORS = {"W_D", "W_E", "b_D", "b_E", _LOG_THRESHOLD} | _GLU


def open_openmoss(folder: Path) -> Sae:
    """Open one SAE of lm_saes.

    Args: folder: an existing folder, with symlinks resolved.
    Raises: CheckpointError if a file is damaged or contradicts `config.json`, or it is no plain SAE
        (`sae_type`).
    """
    config = Fields.read(inside(folder, CONFIG))
    config.one_of("sae_type", ("sae",), default="sae")
    path = inside(folder, WEIGHTS)
    tensors, _ = map_safetensors(path)
    weights = {name: part for name, part in tensors.items() if not name.startswith(_NORM)}
    expect_only(weights, _TENSORS, "an SAE of lm_saes", path)
    d_sae, d_in = matrix_shape(tensors, "W_D", path)
    _check_sizes(config, d_sae, d_in)
    scales, unscaled = _scales(config, tensors, d_in, path)
    hook, elsewhere = lm_saes.place(config)
    sae = Sae(
        architecture="jumprelu" if _gates(config) else "standard",
        d_in=d_in,
        d_sae=d_sae,
        hook=hook,
        path=path,
        stored=stored(
            take(tensors, "W_E", (d_in, d_sae), path).T,
            tensors["W_D"],
            take(tensors, "b_E", (d_sae,), path),
            _decoder_bias(config, tensors, d_in, path),
            subtracts_b_dec=False,
            input_scale=scales.into,
            output_scale=scales.out,
        ),
        activation=_activation(config, tensors, d_sae, path),
        refusal=lm_saes.refusal(config) or elsewhere or unscaled,
    )
    return checked(sae, folder, tensors)


def _gates(config: Fields) -> bool:
    return (config.text("act_fn") or "jumprelu").lower() == "jumprelu"


def _check_sizes(config: Fields, d_sae: int, d_in: int) -> None:
    config.equal("d_model", d_in, WEIGHTS)
    if config.values.get("expansion_factor") is not None:
        said = int(d_in * config.number("expansion_factor"))
        if said != d_sae:
            message = f"expected {d_sae} features as in `{WEIGHTS}`, got {said} by `expansion_factor`"
            raise CheckpointError(message, path=config.path)


def _scales(
    config: Fields, tensors: Mapping[str, Tensor], d_in: int, path: Path
) -> tuple[Scales, str | None]:
    if config.text("norm_activation") == "inference":
        return Scales(1.0, 1.0), None
    source = config.text("hook_point_in") or ""
    norms = [_norm(tensors, name, path) for name in (source, config.text("hook_point_out") or source)]
    if norms[0] is None or norms[1] is None:
        message = (
            f"expected `{_NORM}<hook>` among its tensors, without which the scale of its input is a guess"
        )
        return Scales(1.0, 1.0), f"{message}: not served"
    return Scales.of(d_in, norms[0], norms[1]), None


def _norm(tensors: Mapping[str, Tensor], hook: str, path: Path) -> float | None:
    name = f"{_NORM}{hook}"
    if name not in tensors:
        return None
    if tensors[name].numel() != 1:
        raise CheckpointError("expected a single number", path=path, tensor=name)
    value = float(tensors[name])
    if not (0.0 < value < math.inf):
        raise CheckpointError(f"expected a positive average norm, got {value}", path=path, tensor=name)
    return value


def _decoder_bias(config: Fields, tensors: Mapping[str, Tensor], d_in: int, path: Path) -> Tensor:
    if not config.flag("use_decoder_bias", default=True):
        return torch.zeros(d_in)
    return take(tensors, "b_D", (d_in,), path).float()


def _activation(config: Fields, tensors: Mapping[str, Tensor], d_sae: int, path: Path) -> Activation:
    if not _gates(config):
        return rectifier(d_sae)
    log_threshold = take(tensors, _LOG_THRESHOLD, (d_sae,), path)
    check_finite({_LOG_THRESHOLD: log_threshold}, path)
    by_norm = config.flag("sparsity_include_decoder_norm", default=True)
    theta = log_threshold.double().exp().clamp(max=3e38).float()
    return jump_relu(lm_saes.per_feature_threshold(theta, tensors["W_D"], by_norm=by_norm))
