"""OpenAI's autoencoders: the activation's name and k lie in the file, the place in its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.errors import CheckpointError
from steerserve.sae import Hook, open_sae

from .layouts import D_SAE, K, Written, check, openai, stream


def test_a_top_k_autoencoder_normalises_each_token(tmp_path: Path) -> None:
    sae = check(openai(tmp_path))
    assert (sae.architecture, sae.top_k, sae.normalisation) == ("topk", K, "layer_norm")
    assert (sae.hook, sae.per_feature) == (Hook(3, "resid_post"), False)
    for word in ("top-k", "layer norm"):
        assert word in (sae.needs_resident or "")


def test_a_relu_autoencoder_normalises_nothing(tmp_path: Path) -> None:
    path = openai(tmp_path, activation="ReLU", activation_state_dict={}).path
    t, x = torch.load(path, weights_only=True), stream()
    f = torch.relu((x - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"])
    sae = check(Written(path, x, f, f @ t["decoder.weight"].T + t["pre_bias"]))
    assert (sae.architecture, sae.normalisation, sae.per_feature) == ("standard", "none", True)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"activation": "Identity"}, "Identity"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "not rectified"),
    ],
)
def test_what_is_not_rectified_is_refused(values: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert reason in (open_sae(openai(tmp_path, **values).path).refusal or "")


@pytest.mark.parametrize(
    "values",
    [
        {"activation": "TopK", "activation_state_dict": {}},
        {"activation_state_dict": {"k": 0}},
        {"activation_state_dict": {"k": D_SAE + 1}},
        {"activation_state_dict": {"k": "5"}},
        {"activation": "Softmax"},
        {"activation": 3},
        {"unheard_of": torch.zeros(2)},
    ],
)
def test_an_activation_nobody_knows_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected"):
        open_sae(openai(tmp_path, **values).path)


def test_an_activation_that_is_a_class_is_never_unpickled(tmp_path: Path) -> None:
    path = openai(tmp_path, activation=torch.nn.Identity).path
    with pytest.raises(CheckpointError, match="nothing else is unpickled"):
        open_sae(path)


@pytest.mark.parametrize(
    ("folder", "hook", "refused"),
    [
        ("resid_post_mlp", Hook(3, "resid_post"), False),
        ("resid_post_attn_v5_128k", None, True),
        ("mlp_post_act", None, True),
        ("elsewhere", None, False),
    ],
)
def test_the_path_says_where(folder: str, hook: Hook | None, refused: bool, tmp_path: Path) -> None:
    path = tmp_path / folder / "autoencoders" / "3.pt"
    path.parent.mkdir(parents=True)
    openai(tmp_path / "first").path.rename(path)
    sae = open_sae(path)
    assert (sae.hook, sae.refusal is not None) == (hook, refused)
