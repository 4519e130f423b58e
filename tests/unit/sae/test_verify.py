from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from steerserve.errors import CheckpointError
from steerserve.sae import Manifest, verify_sae, write_manifest
from steerserve.sae.files import sha256_of
from steerserve.sae.formats import common

from .conftest import D_IN, D_SAE, Make

WEIGHTS, STATS = "sae_weights.safetensors", "stats.safetensors"


@pytest.fixture(autouse=True)
def _all_files_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that opening leaves everything to the complete check."""
    monkeypatch.setattr(common, "OPENED_WHOLE", 0)


@pytest.fixture
def folder(make: Make) -> Path:
    _, folder = make("standard")
    stats = {"max_activation": torch.ones(D_SAE), "firing_rate": torch.full((D_SAE,), 0.5)}
    save_file(stats, folder / STATS)
    _write_manifest(folder)
    return folder


def _write_manifest(folder: Path) -> None:
    said = {
        "model": {"name": "demo"},
        "hook": {"layer": 3, "site": "resid_post"},
        "d_in": D_IN,
        "d_sae": D_SAE,
        "architecture": "standard",
        "files": {name: sha256_of(folder / name) for name in (WEIGHTS, STATS)},
        "finite": True,
    }
    write_manifest(folder, Manifest.model_validate(said))


def test_a_whole_sae_passes_and_says_how_far_it_is(folder: Path) -> None:
    heard: list[tuple[int, int]] = []
    sae = verify_sae(folder, lambda done, to_do: heard.append((done, to_do)))
    assert sae.d_sae == D_SAE
    assert heard == sorted(heard)
    assert len({to_do for _, to_do in heard}) == 1
    assert heard[-1][0] == heard[-1][1] > (folder / WEIGHTS).stat().st_size


@pytest.mark.parametrize("name", [WEIGHTS, STATS])
def test_a_byte_that_changed_is_found(name: str, folder: Path) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256") as caught:
        verify_sae(folder)
    assert caught.value.path.name == name


def test_a_weight_that_is_not_finite_is_found_whatever_the_manifest_says(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["W_dec"][D_SAE // 2, 1] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    _write_manifest(folder)
    with pytest.raises(CheckpointError, match="finite") as caught:
        verify_sae(folder)
    assert caught.value.tensor == "W_dec"


def test_an_npz_without_a_manifest_is_scanned(tmp_path: Path) -> None:
    shapes = {
        "W_enc": (D_IN, D_SAE),
        "W_dec": (D_SAE, D_IN),
        "b_enc": D_SAE,
        "b_dec": D_IN,
        "threshold": D_SAE,
    }
    arrays = {name: np.ones(shape, "f4") for name, shape in shapes.items()}
    np.savez(tmp_path / "params.npz", **arrays)
    assert verify_sae(tmp_path).d_sae == D_SAE
    arrays["W_enc"][0, 3] = np.inf
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(CheckpointError, match="finite") as caught:
        verify_sae(tmp_path)
    assert caught.value.tensor == "W_enc"
