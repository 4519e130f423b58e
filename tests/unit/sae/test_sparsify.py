"""sparsify's folders against sparsify itself (fixtures/generate.py), and what of them is not served."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerserve.errors import CheckpointError
from steerserve.sae import Hook, open_sae

from .layouts import D_IN, D_SAE, Written, check, sparsify

REAL = Path(__file__).parent / "fixtures" / "sparsify"


@pytest.mark.parametrize(("name", "layer"), [("layers.3", 3), ("layers.5", 5)])
def test_what_sparsify_saved_computes_what_sparsify_computed(name: str, layer: int) -> None:
    expected = load_file(REAL / name / "expected.safetensors")
    sae = check(Written(REAL / name, expected["x"], expected["f"], expected["out"]))
    assert (sae.architecture, sae.top_k, sae.hook) == ("topk", 4, Hook(layer, "resid_post"))


def test_of_each_group_the_largest_feature_is_kept_as_sparsify_keeps_it() -> None:
    expected = load_file(REAL / "layers.7" / "expected.safetensors")
    sae = check(Written(REAL / "layers.7", expected["x"], expected["f"], expected["out"]))
    assert (sae.architecture, sae.top_k, sae.per_feature) == ("groupmax", None, False)
    assert "group" in (sae.needs_resident or "")


def test_groups_that_do_not_divide_the_features_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="divide"):
        open_sae(sparsify(tmp_path, activation="groupmax", k=7).path)


def test_its_exact_top_k_needs_the_whole(tmp_path: Path) -> None:
    sae = open_sae(sparsify(tmp_path).path)
    assert not sae.per_feature
    assert "top-k" in (sae.needs_resident or "")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"transcode": True}, "transcoder"),
        ({"skip_connection": True}, "skip connection"),
        ({"signed": True}, "signed"),
    ],
)
def test_what_no_sae_computes_is_refused_with_the_reason(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    sae = open_sae(sparsify(tmp_path, **settings).path)
    assert reason in (sae.refusal or "")
    with pytest.raises(CheckpointError, match=reason):
        sae.rows([0])


def test_a_skip_connection_among_the_tensors_is_refused_whatever_the_config_says(tmp_path: Path) -> None:
    path = sparsify(tmp_path).path / "sae.safetensors"
    save_file({**load_file(path), "W_skip": torch.ones(D_IN, D_IN)}, path)
    assert "W_skip" in (open_sae(path).refusal or "")


@pytest.mark.parametrize(
    ("name", "hook"),
    [("layers_7", 7), ("model.layers.7", 7), ("h.7", 7), ("my favourite", None)],
)
def test_the_layer_is_the_folders_name(name: str, hook: int | None, tmp_path: Path) -> None:
    sae = open_sae(sparsify(tmp_path).path.rename(tmp_path / name))
    assert sae.hook == (None if hook is None else Hook(hook, "resid_post"))
    assert sae.refusal is None


@pytest.mark.parametrize("name", ["layers.7.mlp", "layers.7.self_attn", "embed_tokens"])
def test_a_place_off_the_residual_stream_is_refused(name: str, tmp_path: Path) -> None:
    assert name in (open_sae(sparsify(tmp_path).path.rename(tmp_path / name)).refusal or "")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_latents": D_SAE + 1},
        {"num_latents": 0},
        {"num_latents": -1},
        {"d_in": D_IN + 1},
        {"k": 0},
        {"k": D_SAE + 1},
        {"k": True},
        {"activation": "relu"},
        {"transcode": "no"},
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected"):
        open_sae(sparsify(tmp_path, **settings).path)


def test_a_decoder_the_other_way_round_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(sparsify(tmp_path).path, tmp_path / "layers.4")
    tensors = load_file(folder / "sae.safetensors")
    save_file({**tensors, "W_dec": tensors["W_dec"].T.contiguous()}, folder / "sae.safetensors")
    with pytest.raises(CheckpointError):
        open_sae(folder)
