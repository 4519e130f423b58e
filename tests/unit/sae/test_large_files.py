"""Files that are too large to be read at start-up: opened by their header, and read by the row."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.sparse import WEIGHTS, feature_values, write_sparse_sae
from steerserve.errors import CheckpointError
from steerserve.sae import FeatureRows, Manifest, Sae, open_sae, write_manifest
from steerserve.sae.files import map_safetensors, sha256_of
from steerserve.sae.formats import common

from .conftest import D_IN, D_SAE, Make

MILLION, WIDTH = 2**20, 4096
FEATURES = [61, 3, 3, 40]


@pytest.fixture
def all_files_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "OPENED_WHOLE", 0)


def _equal(a: FeatureRows, b: FeatureRows) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


def _resident_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def test_a_million_features_are_served_without_being_loaded(tmp_path: Path) -> None:
    named = [0, 1, 777_777, MILLION - 1]
    folder = write_sparse_sae(tmp_path / "sae", MILLION, WIDTH, named)
    before = _resident_mib()
    sae = open_sae(folder)
    rows = sae.rows(named)
    sae.rows([feature ^ 4096 for feature in named])
    assert _resident_mib() - before < 100
    for place, feature in enumerate(named):
        encoder, decoder = feature_values(feature, WIDTH)
        assert torch.equal(rows.encoder[place], encoder.float())
        assert torch.equal(rows.decoder[place], decoder.float())


def test_a_file_larger_than_memory_can_be_mapped(tmp_path: Path) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    d_sae = 2 * memory // (4 * WIDTH)
    write_sparse_sae(tmp_path / "sae", d_sae, WIDTH, [])
    tensors, _ = map_safetensors(tmp_path / "sae" / WEIGHTS)
    assert sum(part.nbytes for part in tensors.values()) > memory
    assert tensors["W_enc"][-1, -1] == 0


@pytest.mark.usefixtures("all_files_are_large")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "batchtopk"])
def test_rows_that_are_read_equal_rows_that_are_mapped(
    kind: str, dtype: torch.dtype, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = make(kind)
    save_file({k: part.to(dtype) for k, part in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    large = open_sae(folder)
    monkeypatch.undo()
    small = open_sae(folder)
    assert large.reader is not None
    assert small.reader is None
    assert _equal(large.rows(FEATURES), small.rows(FEATURES))
    assert _equal(large.rows(FEATURES[:1]), small.rows(FEATURES[:1]))
    assert len(large.rows([])) == 0


@pytest.mark.usefixtures("all_files_are_large")
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_an_npz_are_read_in_either_memory_order(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    arrays = {k: np.asarray(random.normal(size=s), "f4", order=order) for k, s in shapes.items()}
    np.savez(tmp_path / "params.npz", **arrays, threshold=np.abs(arrays["b_enc"]))
    large = open_sae(tmp_path)
    monkeypatch.undo()
    assert large.reader is not None
    assert _equal(large.rows(FEATURES), open_sae(tmp_path).rows(FEATURES))
    assert torch.equal(large.rows([7]).encoder[0], torch.from_numpy(arrays["W_enc"][:, 7]))


@pytest.mark.usefixtures("all_files_are_large")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "threshold"])
def test_a_weight_that_is_not_finite_is_refused_when_its_feature_is_named(
    name: str, bad: float, make: Make
) -> None:
    _, folder = make("jumprelu")
    tensors = load_file(folder / WEIGHTS)
    (tensors[name].T if name == "W_enc" else tensors[name])[5] = bad
    save_file(tensors, folder / WEIGHTS)
    sae = open_sae(folder)
    sae.rows([4, 6])
    for _ in range(2):
        with pytest.raises(CheckpointError, match="finite") as caught:
            sae.rows([5])
        assert caught.value.tensor == name


@pytest.mark.usefixtures("all_files_are_large")
def test_what_belongs_to_no_single_feature_is_still_scanned_at_start_up(make: Make) -> None:
    _, folder = make("jumprelu")
    tensors = load_file(folder / WEIGHTS)
    tensors["b_dec"][0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="finite") as caught:
        open_sae(folder)
    assert caught.value.tensor == "b_dec"


def _opened(make: Make) -> tuple[Sae, Path]:
    _, folder = make("standard")
    sae = open_sae(folder)
    sae.rows([1])
    return sae, folder / WEIGHTS


@pytest.mark.usefixtures("all_files_are_large")
def test_a_file_cut_short_while_it_is_served_is_an_error_and_no_crash(make: Make) -> None:
    sae, path = _opened(make)
    os.truncate(path, 4096)
    with pytest.raises(CheckpointError, match="as it was opened") as caught:
        sae.rows([2])
    assert caught.value.path == path


@pytest.mark.usefixtures("all_files_are_large")
def test_a_file_rewritten_while_it_is_served_is_refused(make: Make) -> None:
    sae, path = _opened(make)
    data = path.read_bytes()
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))
    with pytest.raises(CheckpointError, match="as it was opened"):
        sae.rows([2])
    assert len(sae.rows([1])) == 1


@pytest.mark.usefixtures("all_files_are_large")
def test_a_file_replaced_while_it_is_served_goes_on_as_it_was(make: Make) -> None:
    sae, path = _opened(make)
    before = open_sae(path.parent).rows([2])
    other = path.with_name("other")
    save_file({name: part + 1 for name, part in load_file(path).items()}, other)
    other.replace(path)
    assert _equal(sae.rows([2]), before)


@pytest.mark.usefixtures("all_files_are_large")
def test_a_file_system_that_cannot_tell_what_is_cached_is_read_all_the_same(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, path = _opened(make)
    before = open_sae(path.parent).rows([2])

    def unsupported(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "preadv", unsupported)
    assert _equal(sae.rows([2]), before)


@pytest.mark.usefixtures("all_files_are_large")
def test_a_disk_that_fails_is_an_error_that_names_file_and_tensor(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, path = _opened(make)

    def failing(*_: object) -> bytes:
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(CheckpointError, match="bad sector") as caught:
        sae.rows([2])
    assert (caught.value.path, caught.value.tensor) == (path, "W_enc")


@pytest.mark.parametrize("end", [-1, 1])
def test_a_large_file_of_another_length_than_its_header_says_is_refused(end: int, tmp_path: Path) -> None:
    folder = write_sparse_sae(tmp_path / "sae", MILLION, WIDTH, [])
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + end)
    with pytest.raises(CheckpointError, match="whole safetensors file"):
        open_sae(folder)


def _with_manifest(folder: Path, **files: str) -> None:
    said = {
        "model": {"name": "demo"},
        "hook": {"layer": 3, "site": "resid_post"},
        "d_in": D_IN,
        "d_sae": D_SAE,
        "architecture": "standard",
        "files": {WEIGHTS: sha256_of(folder / WEIGHTS), **files},
    }
    write_manifest(folder, Manifest.model_validate(said))


@pytest.mark.usefixtures("all_files_are_large")
def test_a_hash_that_is_not_compared_is_said_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    _, folder = make("standard")
    _with_manifest(folder, **{WEIGHTS: "0" * 64})
    with caplog.at_level(logging.WARNING, logger="steerserve"):
        open_sae(folder)
    (record,) = caplog.records
    assert str(folder / WEIGHTS) in record.message
    assert "was not checked" in record.message


def test_a_hash_that_is_compared_is_not_mentioned(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    _, folder = make("standard")
    _with_manifest(folder)
    open_sae(folder)
    assert not caplog.records
