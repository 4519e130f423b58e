"""Folders made to harm: none leads out of itself, runs code, hangs, or takes memory for a lie."""

from __future__ import annotations

import json
import os
import resource
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from steerserve.errors import CheckpointError
from steerserve.sae import Manifest, open_sae, read_direction, write_manifest
from steerserve.sae.files import sha256_of

from .conftest import D_IN, D_SAE, Make

WEIGHTS = "sae_weights.safetensors"
MANIFEST = "manifest.json"


def manifest(folder: Path, **files: str) -> Manifest:
    """One that is right about the folder, and names more files."""
    return Manifest.model_validate(
        {
            "model": {"name": "demo"},
            "hook": {"layer": 3, "site": "resid_post"},
            "d_in": D_IN,
            "d_sae": D_SAE,
            "architecture": "standard",
            "files": {WEIGHTS: sha256_of(folder / WEIGHTS), **files},
        }
    )


def header(entries: dict[str, object], data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize(
    "name", ["../outside", "inner/../../outside", "{root}/outside", "..", ".", "", "link"]
)
def test_a_manifest_that_names_a_file_outside_is_refused(name: str, make: Make, tmp_path: Path) -> None:
    _, folder = make("standard")
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    (folder / "link").symlink_to(outside)
    named = name.format(root=tmp_path)
    said = manifest(folder).model_dump(mode="json")
    said["files"][named] = sha256_of(outside)
    (folder / MANIFEST).write_text(json.dumps(said))
    with pytest.raises(CheckpointError):
        open_sae(folder)


@pytest.mark.parametrize("name", [MANIFEST, "stats.safetensors"])
def test_a_file_beside_the_weights_that_leads_out_is_refused(name: str, make: Make, tmp_path: Path) -> None:
    _, folder = make("standard")
    statistics = {name: torch.ones(D_SAE) for name in ("firing_rate", "max_activation")}
    save_file(statistics, folder / "stats.safetensors")
    write_manifest(folder, manifest(folder, **{"stats.safetensors": sha256_of(folder / "stats.safetensors")}))
    assert open_sae(folder).manifest is not None
    (folder / name).symlink_to((folder / name).rename(tmp_path / name))
    with pytest.raises(CheckpointError, match="leads out"):
        open_sae(folder)


def test_a_chain_of_links_that_ends_outside_is_refused(make: Make, tmp_path: Path) -> None:
    _, folder = make("standard")
    outside = (folder / WEIGHTS).rename(tmp_path / "w")
    (folder / "inner").mkdir()
    (folder / "inner" / "w").symlink_to(outside)
    (folder / WEIGHTS).symlink_to("inner/w")
    with pytest.raises(CheckpointError, match="leads out"):
        open_sae(folder)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _listen(path: Path) -> None:
    # A path of its own length is more than a socket's name may have.
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as found:
            found.bind(path.name)
    finally:
        os.chdir(before)


KINDS: dict[str, Callable[[Path], None]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "socket": _listen,
    "loop": _loop,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [WEIGHTS, "cfg.json"])
def test_what_is_no_regular_file_is_never_read(name: str, kind: str, make: Make) -> None:
    _, folder = make("standard")
    (folder / name).unlink()
    KINDS[kind](folder / name)
    with pytest.raises(CheckpointError):
        open_sae(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ae.pt", "params.npz"])
def test_what_is_no_regular_file_is_never_read_alone(name: str, kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / name)
    with pytest.raises(CheckpointError):
        open_sae(tmp_path / name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_direction_is_read_of_a_regular_file_alone(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "french.safetensors")
    with pytest.raises(CheckpointError):
        read_direction(tmp_path / "french.safetensors")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**12, 100_000_001, 9])
def test_a_header_that_is_longer_than_its_file_takes_no_memory(length: int, make: Make) -> None:
    _, folder = make("standard")
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + b"{}")
    before = peak_mib()
    with pytest.raises(CheckpointError):
        open_sae(folder)
    assert peak_mib() - before < 64


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [2**63, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1] * 70 + [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]},
        {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": 7, "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**64]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "more": 1},
        None,
        [],
    ],
)
def test_a_header_that_lies_is_refused_by_name_and_takes_no_memory(entry: object, make: Make) -> None:
    _, folder = make("standard")
    (folder / WEIGHTS).write_bytes(header({"W_enc": entry}))
    before = peak_mib()
    with pytest.raises(CheckpointError) as caught:
        open_sae(folder)
    assert caught.value.path.name == WEIGHTS
    assert peak_mib() - before < 64


@pytest.mark.parametrize("name", ["W_enc\x00", "../W_enc", "W_enc\n", "\ud800", "W" * 100_000])
def test_a_tensor_of_a_strange_name_is_refused(name: str, make: Make) -> None:
    _, folder = make("standard")
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    (folder / WEIGHTS).write_bytes(header({name: entry}))
    with pytest.raises(CheckpointError):
        open_sae(folder)


def test_weights_that_hide_behind_the_last_tensor_are_refused(make: Make) -> None:
    _, folder = make("standard")
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0" * 64)
    with pytest.raises(CheckpointError, match="whole safetensors"):
        open_sae(folder)


class Bomb:
    """What a pickle would run."""

    fired: Path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.fired,)


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_torch_file_never_runs(depth: int, zipped: bool, tmp_path: Path) -> None:
    bomb = Bomb()
    bomb.fired = tmp_path / "fired"
    content: object = bomb
    for _ in range(depth):
        content = {"encoder.weight": content, "b_dec": torch.zeros(3)}
    torch.save(content, tmp_path / "ae.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError):
        open_sae(tmp_path / "ae.pt")
    assert not bomb.fired.exists()


def test_an_archive_that_unpacks_to_more_than_itself_is_refused_unread(tmp_path: Path) -> None:
    said = {"descr": "<f4", "fortran_order": False, "shape": (2**26,)}
    with (
        zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("W_enc.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, said)
        for _ in range(256):
            member.write(b"\0" * 2**20)
    before = peak_mib()
    with pytest.raises(CheckpointError, match="uncompressed"):
        open_sae(tmp_path)
    assert peak_mib() - before < 64


@pytest.mark.parametrize(
    "shape", ["(1073741824, 1073741824)", "(-1,)", "(2, 2**40)", "((2,),)", "__import__('os')"]
)
def test_an_array_whose_header_lies_is_refused_and_takes_no_memory(shape: str, tmp_path: Path) -> None:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\0" * 8
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", content)
    before = peak_mib()
    with pytest.raises(CheckpointError):
        open_sae(tmp_path)
    assert peak_mib() - before < 64


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        3.5e38,
    ],
)
def test_numbers_beyond_float32_in_wider_weights_are_refused(value: float, make: Make) -> None:
    _, folder = make("standard")
    tensors = {name: tensor.double() for name, tensor in load_file(folder / WEIGHTS).items()}
    tensors["W_enc"][0, 0] = value
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError):
        open_sae(folder)


def test_names_that_multiply_through_shared_dictionaries_are_refused(tmp_path: Path) -> None:
    """A hundred kilobytes that name a billion tensors in eight levels; here a hundred thousand in two."""
    level: dict[str, object] = {f"k{n}": 1 for n in range(317)}
    torch.save({f"k{n}": level for n in range(317)}, tmp_path / "ae.pt")
    with pytest.raises(CheckpointError, match="names at most"):
        open_sae(tmp_path / "ae.pt")
