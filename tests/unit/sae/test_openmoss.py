"""The files of lm_saes: features gated on their length in the stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerserve.errors import CheckpointError
from steerserve.sae import Hook, open_sae

from .layouts import D_IN, D_SAE, check, openmoss

LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
NORM = "dataset_average_activation_norm.blocks.3.hook_resid_post"


def _change(folder: Path, **changes: torch.Tensor | None) -> Path:
    path = folder / "sae_weights.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: part for name, part in tensors.items() if part is not None}, path)
    return folder


def test_features_are_gated_on_their_length(tmp_path: Path) -> None:
    sae = check(openmoss(tmp_path))
    assert (sae.architecture, sae.hook, sae.per_feature) == ("jumprelu", Hook(3, "resid_post"), True)
    thresholds = sae.rows([0, 1]).threshold
    assert not torch.equal(thresholds, load_file(sae.path)[LOG_THRESHOLD].exp()[[0, 1]])


def test_where_norms_do_not_count_features_are_gated_on_pre_activations(tmp_path: Path) -> None:
    sae = open_sae(openmoss(tmp_path, sparsity_include_decoder_norm=False).path)
    torch.testing.assert_close(sae.rows([0, 1]).threshold, load_file(sae.path)[LOG_THRESHOLD].exp()[[0, 1]])


def test_weights_that_were_standardised_have_no_scale(tmp_path: Path) -> None:
    sae = open_sae(openmoss(tmp_path, norm_activation="inference").path)
    assert sae.stored.input_scale == 1.0
    torch.testing.assert_close(sae.b_dec, load_file(sae.path)["b_D"])


def test_without_the_data_sets_norm_it_is_not_served(tmp_path: Path) -> None:
    sae = open_sae(_change(openmoss(tmp_path).path, **{NORM: None}))
    assert "guess" in (sae.refusal or "")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hook_point_out": "blocks.3.hook_mlp_out"}, "transcoder"),
        ({"act_fn": "batchtopk"}, "batchtopk"),
        ({"norm_activation": "batch-wise"}, "batch-wise"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    assert reason in (open_sae(openmoss(tmp_path, **settings).path).refusal or "")


@pytest.mark.parametrize(
    "settings",
    [{"sae_type": "clt"}, {"d_model": D_IN + 1}, {"expansion_factor": 7}, {"expansion_factor": "4"}],
)
def test_a_config_that_contradicts_the_weights_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected"):
        open_sae(openmoss(tmp_path, **settings).path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (NORM, torch.tensor(0.0)),
        (NORM, torch.tensor(float("inf"))),
        (NORM, torch.ones(2)),
        (LOG_THRESHOLD, torch.full((D_SAE,), float("nan"))),
        (LOG_THRESHOLD, torch.zeros(D_SAE + 1)),
        ("W_Q", torch.zeros(2)),
    ],
)
def test_a_tensor_that_decides_and_makes_no_sense_is_refused(
    name: str, value: torch.Tensor, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_sae(_change(openmoss(tmp_path).path, **{name: value}))
    assert caught.value.tensor == name
