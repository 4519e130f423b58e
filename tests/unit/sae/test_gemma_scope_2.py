from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerserve.errors import CheckpointError
from steerserve.sae import Hook, open_sae

from .layouts import D_IN, D_SAE, check, gemma_scope_2


def test_features_are_gated_without_subtracting_b_dec(tmp_path: Path) -> None:
    sae = check(gemma_scope_2(tmp_path))
    assert (sae.architecture, sae.hook, sae.per_feature) == ("jumprelu", Hook(3, "resid_post"), True)
    assert sae.stored.pre_bias is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output"}, "transcoder"),
        ({"hf_hook_point_in": "a", "hf_hook_point_out": "a"}, "it reads `a`"),
        (
            {
                "hf_hook_point_in": "model.layers.3.self_attn.o_proj.input",
                "hf_hook_point_out": "model.layers.3.self_attn.o_proj.input",
            },
            "o_proj",
        ),
        ({"type": "transcoder"}, "transcoder"),
        ({"affine_connection": True}, "skip connection"),
    ],
)
def test_what_is_no_sae_of_the_stream_is_refused(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    assert reason in (open_sae(gemma_scope_2(tmp_path, **settings).path).refusal or "")


def test_a_skip_connection_among_the_tensors_is_refused(tmp_path: Path) -> None:
    path = gemma_scope_2(tmp_path).path / "params.safetensors"
    save_file({**load_file(path), "affine_skip_connection": torch.ones(D_IN, D_IN)}, path)
    with pytest.raises(CheckpointError, match="affine_skip_connection"):
        open_sae(path).rows([0])


@pytest.mark.parametrize(
    ("site", "hook", "refused"),
    [
        ("resid_post_all", Hook(7, "resid_post"), False),
        ("mlp_out_all", None, True),
        ("transcoder_all", None, True),
        ("elsewhere", None, False),
    ],
)
def test_without_a_config_the_path_says_where(
    site: str, hook: Hook | None, refused: bool, tmp_path: Path
) -> None:
    folder = gemma_scope_2(tmp_path / site / "layer_7_width_16k_l0_small").path
    (folder / "config.json").unlink()
    sae = open_sae(folder)
    assert (sae.hook, sae.refusal is not None) == (hook, refused)


@pytest.mark.parametrize(
    "settings", [{"width": D_SAE + 1}, {"architecture": "topk"}, {"hf_hook_point_in": 3}]
)
def test_a_config_that_contradicts_the_weights_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected"):
        open_sae(gemma_scope_2(tmp_path, **settings).path)


def test_a_decoder_into_many_layers_is_refused(tmp_path: Path) -> None:
    path = gemma_scope_2(tmp_path).path / "params.safetensors"
    save_file({**load_file(path), "w_dec": torch.ones(D_SAE, 4, D_IN)}, path)
    with pytest.raises(CheckpointError, match="matrix") as caught:
        open_sae(path)
    assert caught.value.tensor == "w_dec"
