"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`, JumpReLU with one threshold θ.

The official code standardises the weights to the data set's norms and gives the decoder unit norm before it
gates, so that feature j is gated at

    θ_j = θ·s_in / ‖d_j·s_in/s_out‖     with s = √d / average norm

in units of pre = W·(s_in·x) + b. (SAELens 6.54 gates at θ·s throughout, which is not what was trained.)

Source: He et al. 2024, arXiv:2410.20526, and github.com/OpenMOSS/Language-Model-SAEs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from steerserve.sae.files import inside, map_safetensors, take
from steerserve.sae.sae import Activation, Sae

from . import lm_saes
from .common import checked, expect_only, jump_relu, matrix_shape, rectifier, stored
from .fields import Fields
from .lm_saes import Scales

__all__ = ["CONFIG", "WEIGHTS", "open_llama_scope"]

CONFIG = "hyperparams.json"
WEIGHTS = "checkpoints/final.safetensors"

_TENSORS = {"decoder.bias", "decoder.weight", "encoder.bias", "encoder.weight"}


def open_llama_scope(folder: Path) -> Sae:
    """Open one Llama Scope SAE.

    Args: folder: an existing folder, with symlinks resolved: the one that holds `hyperparams.json`.
    Raises: CheckpointError if a file is damaged or contradicts `hyperparams.json`.
    """
    path = inside(folder, WEIGHTS)
    tensors, _ = map_safetensors(path)
    expect_only(tensors, _TENSORS, "a Llama Scope SAE", path)
    d_sae, d_in = matrix_shape(tensors, "encoder.weight", path)
    config = Fields.read(inside(folder, CONFIG))
    config.equal("d_model", d_in, WEIGHTS)
    config.equal("d_sae", d_sae, WEIGHTS)
    decoder = take(tensors, "decoder.weight", (d_in, d_sae), path).T
    scales = _scales(config, d_in)
    hook, elsewhere = lm_saes.place(config)
    sae = Sae(
        architecture="jumprelu" if _gates(config) else "standard",
        d_in=d_in,
        d_sae=d_sae,
        hook=hook,
        path=path,
        stored=stored(
            take(tensors, "encoder.weight", (d_sae, d_in), path),
            decoder,
            take(tensors, "encoder.bias", (d_sae,), path),
            _decoder_bias(config, tensors, d_in, path),
            subtracts_b_dec=config.flag("apply_decoder_bias_to_pre_encoder", default=False),
            input_scale=scales.into,
            output_scale=scales.out,
        ),
        activation=_activation(config, decoder, scales),
        refusal=lm_saes.refusal(config) or elsewhere,
    )
    return checked(sae, path.parent, tensors)


def _gates(config: Fields) -> bool:
    return (config.text("act_fn") or "jumprelu").lower() != "relu"


def _scales(config: Fields, d_in: int) -> Scales:
    if config.text("norm_activation") == "inference":
        return Scales(1.0, 1.0)
    norms = config.section("dataset_average_activation_norm")
    return Scales.of(d_in, norms.number("in"), norms.number("out"))


def _decoder_bias(config: Fields, tensors: Mapping[str, Tensor], d_in: int, path: Path) -> Tensor:
    if not config.flag("use_decoder_bias", default=True):
        return torch.zeros(d_in)
    return take(tensors, "decoder.bias", (d_in,), path).float()


def _activation(config: Fields, decoder: Tensor, scales: Scales) -> Activation:
    if not _gates(config):
        return rectifier(decoder.shape[0])
    by_norm = config.flag("sparsity_include_decoder_norm", default=True)
    # ‖d_j·s_in/s_out‖ counts only where norms do; θ·s_in brings the threshold into units of pre.
    theta = config.number("jump_relu_threshold") * (scales.out if by_norm else scales.into)
    return jump_relu(lm_saes.per_feature_threshold(theta, decoder, by_norm=by_norm))
