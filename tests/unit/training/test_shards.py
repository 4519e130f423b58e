from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerserve.errors import CheckpointError, ConfigError
from steerserve.sae import Hook
from steerserve.training.shards import ShardReader, ShardWriter

D = 6
HOOK = Hook(3, "resid_post")


def _rows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    numbers = torch.arange(count, dtype=torch.int32)
    return torch.randn(count, D), numbers, numbers // 7, numbers % 7


def _writer(folder: Path, **settings: Any) -> ShardWriter:
    given: dict[str, Any] = {"rows_per_shard": 10, "dtype": "float32", **settings}
    return ShardWriter(folder, D, HOOK, "demo", **given)


@pytest.mark.parametrize("pieces", [[35], [1] * 35, [10, 10, 10, 5], [3, 29, 0, 3]])
def test_what_is_appended_is_read_back_in_order(pieces: list[int], tmp_path: Path) -> None:
    whole = _rows(35)
    with _writer(tmp_path) as writer:
        for part in zip(*(column.split(pieces) for column in whole), strict=True):
            writer.append(*part)
    reader = ShardReader(tmp_path)
    assert (len(reader), reader.d_in, reader.hook, reader.complete) == (35, D, HOOK, True)
    assert reader.header.model.name == "demo"
    for window in (slice(None), slice(5, 31), slice(12, 13), slice(20, 20), slice(-4, None)):
        for found, wanted in zip(reader[window], whole, strict=True):
            assert torch.equal(found, wanted[window])


def test_bfloat16_shards_keep_the_rounded_activations(tmp_path: Path) -> None:
    whole = _rows(25)
    with _writer(tmp_path, dtype="bfloat16") as writer:
        writer.append(*whole)
    assert torch.equal(ShardReader(tmp_path)[:].activations, whole[0].bfloat16())


def test_a_harvest_cut_short_leaves_a_readable_prefix(tmp_path: Path) -> None:
    whole = _rows(35)
    writer = _writer(tmp_path)
    writer.append(*whole)
    writer.abandon()
    (tmp_path / ".shard-00003.safetensors.part").write_bytes(b"half of a shard")
    reader = ShardReader(tmp_path)
    assert (len(reader), reader.complete) == (30, False)
    assert torch.equal(reader[:].activations, whole[0][:30])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [1, 9, 10])
def test_a_shard_is_what_safetensors_itself_reads(dtype: str, count: int, tmp_path: Path) -> None:
    whole = _rows(count)
    # An odd width: what lies behind it begins at an odd multiple of two bytes.
    activations = whole[0][:, :5]
    with ShardWriter(tmp_path, 5, HOOK, "demo", dtype=dtype, rows_per_shard=10) as writer:  # type: ignore[arg-type]
        writer.append(activations, *whole[1:])
    found = load_file(tmp_path / "shard-00000.safetensors")
    assert torch.equal(found["activations"], activations.to(getattr(torch, dtype)))
    for name, column in zip(("tokens", "sequence", "position"), whole[1:], strict=True):
        assert torch.equal(found[name], column)
    assert torch.equal(ShardReader(tmp_path)[:].position, whole[3])


@pytest.mark.parametrize("stored", [0, 1, 3])
def test_a_harvest_cut_short_goes_on_behind_its_whole_shards(stored: int, tmp_path: Path) -> None:
    whole = _rows(35)
    writer = _writer(tmp_path)
    writer.append(*(column[: 10 * stored + 4] for column in whole))
    writer.abandon()
    with _writer(tmp_path, resume=True) as writer:
        assert len(writer) == 10 * stored
        assert writer.stored(0, *whole[1:]) == 10 * stored
        assert writer.stored(7, *(column[7:] for column in whole[1:])) == max(0, 10 * stored - 7)
        assert writer.stored(30, *(column[30:] for column in whole[1:])) == 0
        writer.append(*(column[10 * stored :] for column in whole))
    reader = ShardReader(tmp_path)
    assert (len(reader), reader.complete) == (35, True)
    assert all(torch.equal(found, wanted) for found, wanted in zip(reader[:], whole, strict=True))


@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_harvest_of_other_texts_is_not_continued(column: int, tmp_path: Path) -> None:
    whole = _rows(25)
    writer = _writer(tmp_path)
    writer.append(*whole)
    writer.abandon()
    labels = [labels.clone() for labels in whole[1:]]
    labels[column][13] += 1
    with pytest.raises(ConfigError, match="rows 10 to 20 hold other tokens"):
        _writer(tmp_path, resume=True).stored(0, *labels)


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"model": "other"}, {"hook": "resid_post.2"}])
def test_a_harvest_of_another_place_is_not_continued(change: dict[str, Any], tmp_path: Path) -> None:
    with _writer(tmp_path) as writer:
        writer.append(*_rows(12))
    given = {"d_in": D, "hook": HOOK, "model": "demo", "dtype": "float32", **change}
    with pytest.raises(ConfigError, match="to hold a harvest of"):
        ShardWriter(tmp_path, resume=True, **given)


def test_only_one_writer_writes_to_a_folder(tmp_path: Path) -> None:
    with _writer(tmp_path), pytest.raises(ConfigError, match="no other harvest"):
        _writer(tmp_path)
    _writer(tmp_path)


def test_a_full_disk_is_said_and_whole_shards_stay(tmp_path: Path) -> None:
    # The device on which every write finds no space.
    (tmp_path / ".shard-00002.safetensors.part").symlink_to("/dev/full")
    writer = _writer(tmp_path)
    with pytest.raises(CheckpointError, match="No space left on device; the 20 of whole shards stay"):
        writer.append(*_rows(35))
    assert len(ShardReader(tmp_path)) == 20
    whole = _rows(35)
    with _writer(tmp_path, resume=True) as writer:
        writer.append(*(column[20:] for column in whole))
    assert len(ShardReader(tmp_path)) == 35


def test_a_failing_harvest_is_not_marked_complete(tmp_path: Path) -> None:
    def harvest() -> None:
        with _writer(tmp_path) as writer:
            writer.append(*_rows(12))
            raise RuntimeError("engine died")

    with pytest.raises(RuntimeError, match="engine"):
        harvest()
    assert not ShardReader(tmp_path).complete


def test_a_folder_with_a_harvest_is_not_written_over(tmp_path: Path) -> None:
    with _writer(tmp_path) as writer:
        writer.append(*_rows(12))
    with pytest.raises(ConfigError, match="empty folder"):
        _writer(tmp_path)


def test_activations_of_another_width_are_refused(tmp_path: Path) -> None:
    activations, *columns = _rows(4)
    with pytest.raises(ConfigError, match=r"expected activations \[n, 6\], got \[4, 5\]"):
        _writer(tmp_path).append(activations[:, :5], *columns)


def test_columns_of_another_length_are_refused(tmp_path: Path) -> None:
    activations, tokens, sequence, position = _rows(4)
    with pytest.raises(ConfigError, match="`sequence`"):
        _writer(tmp_path).append(activations, tokens, sequence[:2], position)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_whole(bad: float, tmp_path: Path) -> None:
    writer, (activations, *columns) = _writer(tmp_path), _rows(4)
    activations[2, 1] = bad
    with pytest.raises(ConfigError, match="finite"):
        writer.append(activations, *columns)
    assert len(writer) == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with _writer(tmp_path) as writer:
        writer.append(*_rows(35))
    return tmp_path


def test_a_truncated_shard_is_refused_by_name(folder: Path) -> None:
    path = folder / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="shard-00002"):
        ShardReader(folder)


def test_a_missing_shard_is_refused_by_name(folder: Path) -> None:
    (folder / "shard-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="shard-00001"):
        ShardReader(folder)


def test_a_nan_on_disk_is_refused_by_name(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    tensors = load_file(path)
    tensors["activations"][3, 3] = float("nan")
    header = ShardReader(folder).header.model_dump_json()
    save_file(tensors, path, {"header": header})
    reader = ShardReader(folder)
    reader.activations(0, 10)
    with pytest.raises(CheckpointError, match="shard-00001"):
        reader.activations(5, 20)


@pytest.mark.parametrize("change", [{"d_in": 5}, {"format": 2}, {"dtype": "int8"}])
def test_a_shard_that_contradicts_its_header_is_refused(change: dict[str, object], folder: Path) -> None:
    path = folder / "shard-00000.safetensors"
    header = {**ShardReader(folder).header.model_dump(), **change}
    save_file(load_file(path), path, {"header": json.dumps(header)})
    with pytest.raises(CheckpointError, match="shard-0000"):
        ShardReader(folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found none"):
        ShardReader(tmp_path)
