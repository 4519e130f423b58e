"""Every way an SAE on disk can be damaged or hostile is refused, naming file and tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from steerserve.errors import CheckpointError
from steerserve.sae import Manifest, open_sae, write_manifest
from steerserve.sae.files import sha256_of

from .conftest import D_IN, D_SAE, Make, edit_config

WEIGHTS = "sae_weights.safetensors"


def _change(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_weights_file_is_refused(keep: int, make: Make) -> None:
    _, folder = make("jumprelu")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="whole safetensors file") as caught:
        open_sae(folder)
    assert caught.value.path.name == WEIGHTS


@pytest.mark.parametrize("offsets", [[0, 8 * 10**12], [-4, 0], [8, 4]])
def test_offsets_out_of_the_file_are_refused(offsets: list[int], make: Make) -> None:
    _, folder = make("jumprelu")
    header = json.dumps({"W_enc": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(CheckpointError):
        open_sae(folder)


def test_overlapping_tensors_are_refused(make: Make) -> None:
    _, folder = make("jumprelu")
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"W_enc": entry, "W_dec": entry}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(CheckpointError):
        open_sae(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_a_weight_that_is_not_finite_is_refused(name: str, bad: float, make: Make) -> None:
    _, folder = make("jumprelu")
    tensor = load_file(folder / WEIGHTS)[name]
    tensor.view(-1)[3] = bad
    _change(folder, **{name: tensor})
    with pytest.raises(CheckpointError, match="finite") as caught:
        open_sae(folder)
    assert caught.value.tensor == name


def test_finite_weights_whose_sum_overflows_are_accepted(make: Make) -> None:
    _, folder = make("standard")
    _change(folder, b_enc=torch.full((D_SAE,), 3e38))
    open_sae(folder)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_a_tensor_of_the_wrong_shape_is_refused(name: str, make: Make) -> None:
    _, folder = make("jumprelu")
    _change(folder, **{name: load_file(folder / WEIGHTS)[name][:-1].contiguous()})
    with pytest.raises(CheckpointError, match="expected shape") as caught:
        open_sae(folder)
    assert caught.value.tensor == name


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_dec", "threshold"])
def test_a_missing_tensor_is_refused(name: str, make: Make) -> None:
    _, folder = make("jumprelu")
    _change(folder, **{name: None})
    with pytest.raises(CheckpointError) as caught:
        open_sae(folder)
    assert caught.value.tensor == name


def test_a_tensor_that_is_not_understood_is_refused(make: Make) -> None:
    _, folder = make("standard")
    _change(folder, W_skip=torch.zeros(D_IN, D_IN))
    with pytest.raises(CheckpointError, match="no such tensor"):
        open_sae(folder)


def test_integer_weights_are_refused(make: Make) -> None:
    _, folder = make("standard")
    _change(folder, b_enc=torch.zeros(D_SAE, dtype=torch.int8))
    with pytest.raises(CheckpointError, match=r"got torch\.int8"):
        open_sae(folder)


@pytest.mark.parametrize("architecture", ["temporal", "", None, 3])
def test_an_unknown_architecture_is_refused(architecture: object, make: Make) -> None:
    _, folder = make("standard")
    edit_config(folder, architecture=architecture)
    with pytest.raises(CheckpointError, match="architecture"):
        open_sae(folder)


@pytest.mark.parametrize("key", ["d_in", "d_sae"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "64", None, 10**12])
def test_a_width_that_is_no_width_is_refused(key: str, value: object, make: Make) -> None:
    _, folder = make("standard")
    edit_config(folder, **{key: value})
    with pytest.raises(CheckpointError):
        open_sae(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "nonsense", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(text: str, make: Make) -> None:
    _, folder = make("standard")
    (folder / "cfg.json").write_text(text)
    with pytest.raises(CheckpointError, match="JSON"):
        open_sae(folder)


@pytest.mark.parametrize("name", ["cfg.json", WEIGHTS])
def test_a_symlink_out_of_the_folder_is_refused(name: str, make: Make, tmp_path: Path) -> None:
    _, folder = make("standard")
    outside = (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads out"):
        open_sae(folder)


def test_a_symlink_to_the_whole_folder_is_followed(make: Make, tmp_path: Path) -> None:
    _, folder = make("standard")
    (tmp_path / "link").symlink_to(folder)
    assert open_sae(tmp_path / "link").d_sae == D_SAE


def test_a_pickle_inside_an_npz_is_never_loaded(tmp_path: Path) -> None:
    fired = tmp_path / "fired"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (fired,)

    bomb = np.empty(1, dtype=object)
    bomb[0] = Bomb()
    np.savez(tmp_path / "params.npz", W_dec=bomb)
    with pytest.raises(CheckpointError, match="nothing was unpickled") as caught:
        open_sae(tmp_path)
    assert caught.value.tensor == "W_dec"
    assert not fired.exists()


def test_a_pickle_named_like_weights_is_never_loaded(make: Make) -> None:
    _, folder = make("standard")
    torch.save({"W_enc": torch.zeros(2)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="whole safetensors file"):
        open_sae(folder)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found nothing"):
        open_sae(tmp_path / "absent")


def test_a_folder_without_an_sae_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        open_sae(tmp_path)


@pytest.mark.parametrize("features", [[-1], [D_SAE], [0, 10**9]])
def test_a_feature_out_of_range_is_refused(features: list[int], make: Make) -> None:
    _, folder = make("standard")
    with pytest.raises(CheckpointError, match=f"0, {D_SAE}"):
        open_sae(folder).rows(features)


def _manifest(folder: Path, **changes: object) -> Manifest:
    said = {
        "model": {"name": "demo"},
        "hook": {"layer": 3, "site": "resid_post"},
        "d_in": D_IN,
        "d_sae": D_SAE,
        "architecture": "standard",
        "files": {WEIGHTS: sha256_of(folder / WEIGHTS)},
        **changes,
    }
    return Manifest.model_validate(said)


def test_weights_that_changed_since_the_manifest_are_refused(make: Make) -> None:
    _, folder = make("standard")
    write_manifest(folder, _manifest(folder))
    assert open_sae(folder).manifest is not None
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        open_sae(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"d_in": D_IN + 1},
        {"d_sae": D_SAE + 1},
        {"architecture": "gated"},
        {"hook": {"layer": 2, "site": "resid_post"}},
        {"files": {}},
    ],
)
def test_a_manifest_that_contradicts_the_files_is_refused(change: dict[str, object], make: Make) -> None:
    _, folder = make("standard")
    write_manifest(folder, _manifest(folder, **change))
    with pytest.raises(CheckpointError, match="manifest"):
        open_sae(folder)


def test_statistics_the_manifest_does_not_list_are_refused(make: Make) -> None:
    _, folder = make("standard")
    write_manifest(folder, _manifest(folder))
    save_file({"max_activation": torch.ones(D_SAE)}, folder / "stats.safetensors")
    with pytest.raises(CheckpointError, match="list the file's sha256"):
        open_sae(folder)
