"""Qwen-Scope: what the file does not say stands in a name above it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steerserve.errors import CheckpointError
from steerserve.sae import Hook, open_sae

from .layouts import D_SAE, K, check, qwen_scope


def test_the_k_of_the_name_is_kept_and_b_dec_is_not_subtracted(tmp_path: Path) -> None:
    sae = check(qwen_scope(tmp_path))
    assert (sae.architecture, sae.top_k, sae.hook) == ("topk", K, Hook(3, "resid_post"))
    assert sae.stored.pre_bias is None


def test_the_nearest_name_counts(tmp_path: Path) -> None:
    sae = open_sae(qwen_scope(tmp_path / "about-L0_7", f"SAE-Res-X-L0_{K}").path)
    assert sae.top_k == K


def test_without_a_k_it_is_not_served(tmp_path: Path) -> None:
    sae = open_sae(qwen_scope(tmp_path, "SAE-Res-Qwen3-1.7B-Base").path)
    assert "L0_50" in (sae.refusal or "")
    with pytest.raises(CheckpointError, match="nothing else says it"):
        sae.rows([0])


@pytest.mark.parametrize("name", [f"SAE-Res-X-W32K-L0_{K}", "SAE-Res-X-L0_0", f"SAE-Res-X-L0_{D_SAE + 1}"])
def test_a_name_that_contradicts_the_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected"):
        open_sae(qwen_scope(tmp_path, name).path)


def test_a_folder_that_happens_to_be_called_so_says_nothing(tmp_path: Path) -> None:
    sae = open_sae(qwen_scope(tmp_path / "my-SAE-notes-2", f"SAE-Res-X-L0_{K}").path)
    assert (sae.refusal, sae.hook) == (None, Hook(3, "resid_post"))


def test_another_site_is_refused(tmp_path: Path) -> None:
    assert "SAE-MLP" in (open_sae(qwen_scope(tmp_path, f"SAE-MLP-X-L0_{K}").path).refusal or "")


@pytest.mark.parametrize("name", ["W_dec", "b_enc", "b_dec"])
def test_a_tensor_the_other_way_round_or_too_short_is_refused(name: str, tmp_path: Path) -> None:
    path = qwen_scope(tmp_path).path
    tensors = torch.load(path, weights_only=True)
    torch.save(
        {**tensors, name: tensors[name].T.clone() if name == "W_dec" else tensors[name][:3].clone()}, path
    )
    with pytest.raises(CheckpointError, match="expected shape") as caught:
        open_sae(path)
    assert caught.value.tensor == name
