"""dictionary_learning's files against dictionary_learning itself (fixtures/generate.py), and by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae import Hook, open_sae

from .layouts import D_IN, D_SAE, K, Written, check, dictionary_learning, trainer

REAL = Path(__file__).parent / "fixtures" / "dictionary_learning"
ARCHITECTURES = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "MatryoshkaBatchTopKSAE": "matryoshka_batchtopk",
    "backup": "batchtopk",
}
TOLD_BY_TENSORS = ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"]


def _expected(name: str, folder: Path) -> Written:
    expected = load_file(REAL / name / "expected.safetensors")
    return Written(folder, expected["x"], expected["f"], expected["out"])


def _copy(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(REAL / name, tmp_path / name))


def _change(folder: Path, **changes: Any) -> Path:
    content = torch.load(folder / "ae.pt", weights_only=True)
    content = {**content, **{name.replace("__", "."): value for name, value in changes.items()}}
    torch.save({name: value for name, value in content.items() if value is not None}, folder / "ae.pt")
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_the_library_saved_computes_what_the_library_computed(name: str) -> None:
    sae = check(_expected(name, REAL / name))
    assert (sae.architecture, sae.hook) == (ARCHITECTURES[name], Hook(3, "resid_post"))
    assert sae.per_feature == (name != "AutoEncoderTopK")


@pytest.mark.parametrize("name", [*TOLD_BY_TENSORS, "MatryoshkaBatchTopKSAE"])
def test_without_a_config_the_tensors_tell(name: str, tmp_path: Path) -> None:
    folder = _copy(name, tmp_path)
    (folder / "config.json").unlink()
    sae = check(_expected(name, folder))
    assert (sae.architecture, sae.hook) == (ARCHITECTURES[name], None)


@pytest.mark.parametrize("name", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_without_a_config_top_k_and_batch_top_k_cannot_be_told_apart(name: str, tmp_path: Path) -> None:
    folder = _copy(name, tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="dict_class"):
        open_sae(folder)


def test_a_backup_carries_its_own_config(tmp_path: Path) -> None:
    folder = _copy("backup", tmp_path)
    (folder / "config.json").unlink()
    assert check(_expected("backup", folder)).hook == Hook(3, "resid_post")


def test_a_backup_without_a_norm_factor_has_none(tmp_path: Path) -> None:
    written = dictionary_learning(tmp_path)
    ae = torch.load(written.path / "ae.pt", weights_only=True)
    torch.save({"step": 3, "ae": ae, "optimizer": {"state": {}}, "norm_factor": None}, written.path / "ae.pt")
    check(written)


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_never_set_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    sae = open_sae(_change(_copy(name, tmp_path), threshold=torch.tensor(-1.0)))
    assert "threshold is −1" in (sae.refusal or "")
    with pytest.raises(CheckpointError, match="never set"):
        sae.rows([0])


def test_top_k_ignores_its_threshold_and_reads_a_file_that_has_none(tmp_path: Path) -> None:
    folder = _copy("AutoEncoderTopK", tmp_path)
    check(_expected("AutoEncoderTopK", _change(folder, threshold=torch.tensor(-1.0))))
    check(_expected("AutoEncoderTopK", _change(folder, threshold=None, k=None)))


@pytest.mark.parametrize("k", [torch.tensor(5), torch.tensor(0), torch.tensor(10**6), torch.tensor([4, 4])])
def test_a_k_that_differs_from_the_configs_or_is_none_is_refused(k: Tensor, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected"):
        open_sae(_change(_copy("AutoEncoderTopK", tmp_path), k=k))


def test_a_checkpoint_takes_the_config_of_the_folder_above(tmp_path: Path) -> None:
    written = dictionary_learning(tmp_path)
    path = tmp_path / "checkpoints" / "ae_1000.pt"
    path.parent.mkdir()
    (written.path / "ae.pt").rename(path)
    assert check(Written(path, written.x, written.f, written.out)).hook == Hook(3, "resid_post")


@pytest.mark.parametrize("name", ["attn_out_layer_3", "mlp_out_layer_3"])
def test_another_site_is_refused(name: str, tmp_path: Path) -> None:
    folder = dictionary_learning(tmp_path).path
    trainer(folder, "BatchTopKSAE", k=K, submodule_name=name)
    assert name in (open_sae(folder).refusal or "")


@pytest.mark.parametrize(
    "settings",
    [
        {"dict_class": "CrossCoder"},
        {"dict_class": "GatedAutoEncoder"},
        {"dict_class": 3},
        {"dict_size": D_SAE + 1},
        {"activation_dim": D_IN + 1},
        {"layer": "3"},
        {"layer": -1},
    ],
)
def test_a_config_that_contradicts_the_file_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = dictionary_learning(tmp_path).path
    trainer(folder, **{"dict_class": "BatchTopKSAE", **settings})
    with pytest.raises(CheckpointError, match="expected"):
        open_sae(folder)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"backup"}))
def test_every_tensor_is_needed_has_its_shape_and_is_finite(name: str, tmp_path: Path) -> None:
    folder = _copy(name, tmp_path)
    whole = torch.load(folder / "ae.pt", weights_only=True)
    for key, tensor in whole.items():
        unused = key == "threshold" and name == "AutoEncoderTopK"
        if unused or not tensor.is_floating_point():
            continue
        spoilt = tensor.clone()
        spoilt[(0,) * tensor.ndim] = torch.nan
        fewer = {other: part for other, part in whole.items() if other != key}
        for content in (fewer, {**whole, key: torch.ones(3, 7)}, {**whole, key: spoilt}):
            torch.save(content, folder / "ae.pt")
            with pytest.raises(CheckpointError):
                open_sae(folder)


def test_a_config_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = dictionary_learning(tmp_path).path
    (folder / "config.json").write_text(json.dumps({"trainer": ["BatchTopKSAE"]}))
    with pytest.raises(CheckpointError, match="trainer"):
        open_sae(folder)
