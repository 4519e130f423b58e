"""Llama Scope against the steps of its official code, one after the other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerserve.errors import CheckpointError
from steerserve.sae import Hook, open_sae

from .layouts import D_IN, D_SAE, Written, check, close, jump_relu, llama_scope, stream


def _official(folder: Path, norm_in: float, norm_out: float) -> Written:
    """`standardize_parameters_of_dataset_norm`, `transform_to_unit_decoder_norm`, `encode`, `decode`."""
    t = load_file(folder / "checkpoints" / "final.safetensors")
    s_in, s_out = math.sqrt(D_IN) / norm_in, math.sqrt(D_IN) / norm_out
    encoder, bias = t["encoder.weight"], t["encoder.bias"] / s_in
    decoder, decoder_bias = t["decoder.weight"] * s_in / s_out, t["decoder.bias"] / s_out
    norm = decoder.norm(dim=0)
    encoder, bias, decoder = encoder * norm[:, None], bias * norm, decoder / norm
    x = stream()
    f = jump_relu((x @ encoder.T + bias) * decoder.norm(dim=0), 0.52)
    # In the units of the weights as they were trained, which is what our features are in.
    return Written(folder, x, f * s_in / norm, f @ decoder.T + decoder_bias)


@pytest.mark.parametrize(("norm_in", "norm_out"), [(6.3125, 6.3125), (12.5, 3.4)])
def test_features_and_reconstruction_are_the_official_codes(
    norm_in: float, norm_out: float, tmp_path: Path
) -> None:
    written = llama_scope(tmp_path, norm_in, norm_out)
    sae = check(written)
    official = _official(tmp_path, norm_in, norm_out)
    assert torch.equal(official.f > 0, written.f > 0)
    close(official.f, written.f)
    close(official.out, written.out)
    assert (sae.architecture, sae.hook, sae.per_feature) == ("jumprelu", Hook(3, "resid_post"), True)


def test_the_threshold_is_not_the_uniform_one(tmp_path: Path) -> None:
    sae = open_sae(llama_scope(tmp_path).path)
    thresholds = sae.rows(range(D_SAE)).threshold
    assert float(thresholds.max() / thresholds.min()) > 1.3


def test_where_norms_do_not_count_the_threshold_is_uniform(tmp_path: Path) -> None:
    sae = open_sae(llama_scope(tmp_path, sparsity_include_decoder_norm=False).path)
    close(sae.rows([1, 2]).threshold, torch.full((2,), 0.52 * math.sqrt(D_IN) / 6.3125))


def test_a_feature_whose_decoder_row_is_zero_never_fires(tmp_path: Path) -> None:
    written = llama_scope(tmp_path)
    path = tmp_path / "checkpoints" / "final.safetensors"
    tensors = load_file(path)
    tensors["decoder.weight"][:, 7] = 0
    save_file(tensors, path)
    assert (open_sae(tmp_path).rows([7]).activations(written.x) == 0).all()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hook_point_in": "blocks.3.ln2.hook_normalized"}, "transcoder"),
        (
            {"hook_point_in": "blocks.3.hook_attn_out", "hook_point_out": "blocks.3.hook_attn_out"},
            "hook_attn_out",
        ),
        ({"act_fn": "topk"}, "act_fn"),
        ({"norm_activation": "token-wise"}, "norm_activation"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    assert reason in (open_sae(llama_scope(tmp_path, **settings).path).refusal or "")


@pytest.mark.parametrize(
    "settings",
    [
        {"jump_relu_threshold": 0},
        {"jump_relu_threshold": float("nan")},
        {"jump_relu_threshold": None},
        {"jump_relu_threshold": 10**400},
        {"dataset_average_activation_norm": {"in": 0.0, "out": 1.0}},
        {"dataset_average_activation_norm": {"in": 1.0}},
        {"dataset_average_activation_norm": 3.0},
        {"d_sae": D_SAE + 1},
        {"d_model": D_IN - 1},
    ],
)
def test_a_config_without_what_decides_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected") as caught:
        open_sae(llama_scope(tmp_path, **settings).path)
    assert caught.value.path.name == "hyperparams.json"
