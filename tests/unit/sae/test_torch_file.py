"""Files of torch.save: what is read of them without unpickling anything but names, shapes and numbers."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.torch_file import read_torch


def _save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_nested_names_are_joined_and_numbers_are_kept_apart(tmp_path: Path) -> None:
    inner = {"w": torch.ones(2), "k": torch.tensor(3, dtype=torch.int), "sizes": torch.arange(4)}
    content = {"ae": inner, "name": "TopK", "step": 7, "half": None, "fractions": [0.25, 0.75]}
    file = read_torch(_save(tmp_path / "a.pt", content))
    assert list(file.tensors) == ["ae.w"]
    assert file.under("ae").values["k"] == 3
    assert torch.equal(file.under("ae").values["sizes"], torch.arange(4))
    plain = {"name": "TopK", "step": 7, "half": None, "fractions": [0.25, 0.75]}
    assert {name: file.values[name] for name in plain} == plain


def test_a_matrix_saved_as_a_transpose_is_read_as_it_was(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).view(2, 3)
    read = read_torch(_save(tmp_path / "a.pt", {"w": matrix.T})).tensors["w"]
    assert not read.is_contiguous()
    assert torch.equal(read, matrix.T)


def test_a_trainers_optimizer_is_never_looked_at(tmp_path: Path) -> None:
    content = {"ae": {"w": torch.ones(2)}, "optimizer": {"state": {0: {"step": torch.zeros(3)[::2]}}}}
    assert list(read_torch(_save(tmp_path / "a.pt", content)).tensors) == ["ae.w"]


@pytest.mark.parametrize(
    "part",
    [
        torch.zeros(1).expand(10**12),
        torch.zeros(1).expand(10**6, 10**6),
        torch.zeros(4, 4)[:, ::2],
        torch.zeros(2, 3, 4).permute(2, 0, 1),
        torch.zeros(1, dtype=torch.int64).expand(10**12),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.float8_e4m3fn),
        torch.zeros(2, device="meta"),
        {1, 2},
    ],
    ids=["long", "wide", "strided", "3-d", "integers", "sparse", "complex", "float8", "meta", "a set"],
)
def test_a_tensor_that_the_file_does_not_hold_whole_is_refused_by_name(part: Any, tmp_path: Path) -> None:
    path = _save(tmp_path / "a.pt", {"encoder.weight": part})
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="expected") as caught:
        read_torch(path)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    assert caught.value.tensor == "encoder.weight"


@pytest.mark.parametrize("said", [10, 200, 255])
def test_a_size_that_the_index_lies_about_is_refused(said: int, tmp_path: Path) -> None:
    path = _save(tmp_path / "a.pt", {"w": torch.zeros(4)})
    data = path.read_bytes()
    # The pickle's BININT1 4, as the storage's size and as the tensor's shape.
    assert data.count(b"K\x04") >= 2
    path.write_bytes(data.replace(b"K\x04", b"K" + bytes([said])))
    with pytest.raises(CheckpointError, match="expected"):
        read_torch(path)


def test_an_index_beyond_a_mebibyte_is_refused_unread(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.pt", {"x" * 2**20: torch.zeros(1)})
    with pytest.raises(CheckpointError, match="index of at most"):
        read_torch(path)


def test_names_nested_too_deep_are_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {"w": torch.zeros(1)}
    for _ in range(20):
        content = {"a": content}
    with pytest.raises(CheckpointError, match="deep"):
        read_torch(_save(tmp_path / "a.pt", content))


def test_reading_copies_no_weight(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.pt", {"w": torch.zeros(2**22)})
    before = _anonymous_bytes()
    held: dict[str, Tensor] = read_torch(path).tensors
    assert float(held["w"][:: 2**10].sum()) == 0.0
    assert _anonymous_bytes() - before < 2**22


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_tensors_that_share_bytes_of_the_file_by_a_lie_are_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.pt", {"a": torch.zeros(100), "b": torch.ones(100)})
    data = path.read_bytes()
    # The first storage claims as much as lies up to the second one's end.
    index = data.index(b"K\x64")
    path.write_bytes(data[:index] + b"K\xfa" + data[index + 2 :])
    with pytest.raises(CheckpointError, match="record"):
        read_torch(path)


def test_views_of_one_storage_are_read(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    file = read_torch(
        _save(tmp_path / "a.pt", {"a": whole[:6].view(2, 3), "b": whole[6:], "none": torch.zeros(0)})
    )
    assert torch.equal(file.tensors["b"], whole[6:])
