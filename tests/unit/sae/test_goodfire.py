from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steerserve.errors import CheckpointError
from steerserve.sae import Hook, open_sae

from .layouts import check, goodfire


def test_features_are_rectified_and_the_decoders_bias_is_not_subtracted(tmp_path: Path) -> None:
    sae = check(goodfire(tmp_path))
    assert (sae.architecture, sae.per_feature, sae.hook) == ("standard", True, Hook(3, "resid_post"))
    assert sae.stored.pre_bias is None


@pytest.mark.parametrize(
    ("name", "hook"),
    [("Llama-3.3-70B-Instruct-SAE-l50.pt", Hook(50, "resid_post")), ("renamed.pt", None)],
)
def test_the_layer_stands_in_the_name(name: str, hook: Hook | None, tmp_path: Path) -> None:
    assert open_sae(goodfire(tmp_path).path.rename(tmp_path / name)).hook == hook


def test_a_layer_of_another_name_is_refused(tmp_path: Path) -> None:
    path = goodfire(tmp_path).path
    tensors = torch.load(path, weights_only=True)
    tensors["decoder.weight"] = tensors.pop("decoder_linear.weight")
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match="no such tensor") as caught:
        open_sae(path)
    assert caught.value.tensor == "decoder.weight"
