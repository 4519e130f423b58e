"""A digest of weights depends on every byte of them, and on nothing else about their files."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerserve.catalog import Catalog, build_catalog
from steerserve.compile import compile_plan
from steerserve.config import DirectionConfig, SaeConfig, SteerserveConfig
from steerserve.errors import CheckpointError
from steerserve.sae import Direction, Hook, content, write_direction
from steerserve.sae.content import content_digest
from steerserve.spec import parse_spec
from tests.support.models import D_MODEL, N_LAYERS
from tests.support.saes import make_sae

# Its encoder alone is 2 MiB.
D_SAE = 8192
SPEC = {"interventions": [{"feature": 5, "op": "ablate"}, {"direction": "north", "op": "add", "value": 1}]}
WEIGHTS = "sae_weights.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_sae(folder / "sae", "jumprelu", 2, d_sae=D_SAE)
    unit = torch.nn.functional.normalize(torch.ones(D_MODEL), dim=0)
    write_direction(folder / "north.safetensors", Direction("north", unit, Hook(2, "resid_post")))
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """As a second replica gets it: the bytes, at another time."""
    folder = Path(shutil.copytree(original, tmp_path / "copy", copy_function=shutil.copyfile))
    for file in folder.rglob("*.*"):
        os.utime(file, (1_000_000_000, 1_000_000_000))
    return folder


def catalog(folder: Path) -> Catalog:
    north = DirectionConfig(name="north", path=folder / "north.safetensors")
    config = SteerserveConfig(saes=[SaeConfig(name="demo", path=folder / "sae")], directions=[north])
    return build_catalog(config, n_layers=N_LAYERS, d_model=D_MODEL)


def plan_digest(folder: Path) -> str:
    return compile_plan(parse_spec(SPEC), catalog(folder)).digest


def test_replicas_with_the_same_weights_name_plans_alike(original: Path, copy: Path) -> None:
    (copy / "sae" / "README.md").write_text("A copy.")
    assert plan_digest(copy) == plan_digest(original)
    for key, source in catalog(copy).sources.items():
        assert source.fingerprint == catalog(original).sources[key].fingerprint


@pytest.mark.parametrize("name", ["sae/" + WEIGHTS, "north.safetensors"])
def test_one_weight_that_differs_changes_the_digest_though_its_file_looks_the_same(
    original: Path, copy: Path, name: str
) -> None:
    times = os.stat(original / name)
    with (copy / name).open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        last = file.read(1)
        file.seek(-2, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(copy / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(copy / name).st_size == times.st_size
    assert plan_digest(copy) != plan_digest(original)


def test_a_configuration_that_differs_changes_the_digest(original: Path, copy: Path) -> None:
    config = copy / "sae" / "cfg.json"
    config.write_text(config.read_text() + " ")
    assert content_digest(copy / "sae") != content_digest(original / "sae")


def test_files_are_told_apart_by_what_their_names_say(original: Path, copy: Path) -> None:
    (copy / "sae" / WEIGHTS).rename(copy / "sae" / "other.safetensors")
    assert content_digest(copy / "sae") != content_digest(original / "sae")
    # A file alone is its bytes, whatever it is called.
    assert content_digest(copy / "sae" / "other.safetensors") == content_digest(original / "sae" / WEIGHTS)


def test_holes_count_as_the_zeros_that_they_are(tmp_path: Path) -> None:
    size, at = 3 * 2**22 + 5, 2**22 + 7
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size)
        file.seek(at)
        file.write(b"x")
    (tmp_path / "dense").write_bytes(bytes(at) + b"x" + bytes(size - at - 1))
    assert (tmp_path / "sparse").stat().st_blocks < (tmp_path / "dense").stat().st_blocks
    assert content_digest(tmp_path / "sparse") == content_digest(tmp_path / "dense")
    (tmp_path / "dense").write_bytes(bytes(size))
    assert content_digest(tmp_path / "sparse") != content_digest(tmp_path / "dense")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The size of every file that is read; all are large."""
    monkeypatch.setattr(content, "_REMEMBERED_FROM", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes: list[int] = []
    original = content._hashed

    def spy(descriptor: int, size: int) -> str:
        sizes.append(size)
        return original(descriptor, size)

    monkeypatch.setattr(content, "_hashed", spy)
    return sizes


def test_a_large_file_is_read_once_for_all_that_ask(original: Path, hashed: list[int]) -> None:
    path = original / "sae" / WEIGHTS
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(content_digest, [path] * 16))
    assert len(found) == 1
    assert hashed == [path.stat().st_size]


def test_a_large_file_that_was_written_again_is_read_again(copy: Path, hashed: list[int]) -> None:
    path = copy / "sae" / WEIGHTS
    tensors, before = load_file(path), content_digest(path)
    tensors["W_dec"][-1, -1] += 1
    save_file(tensors, path)
    assert content_digest(path) != before
    assert len(hashed) == 2


def test_what_a_crash_left_half_written_is_read_again(
    original: Path, hashed: list[int], tmp_path: Path
) -> None:
    path = original / "sae" / WEIGHTS
    wanted = content_digest(path)
    (kept,) = (tmp_path / "cache" / "steerserve" / "digests").iterdir()
    kept.write_text(wanted[:7])
    assert content_digest(path) == wanted == kept.read_text()
    assert len(hashed) == 2


def test_a_file_that_cannot_be_read_is_named(original: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected to read all of it") as caught:
        content_digest(tmp_path / "nowhere")
    assert caught.value.path == tmp_path / "nowhere"


def test_without_a_place_to_keep_digests_a_large_file_is_read_each_time(
    original: Path, hashed: list[int], tmp_path: Path
) -> None:
    path = original / "sae" / WEIGHTS
    (tmp_path / "cache").write_text("no folder")
    assert content_digest(path) == content_digest(path)
    assert len(hashed) == 2
