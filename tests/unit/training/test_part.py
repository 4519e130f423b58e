from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steerserve.errors import CheckpointError, ConfigError
from steerserve.sae import Hook
from steerserve.training.corpus import open_corpus
from steerserve.training.part import Part, check_parts, join_parts
from steerserve.training.shard_file import INDEX
from steerserve.training.shards import ShardReader, ShardWriter

D = 4


def _write(shards: Path, part: Part, rows: int, model: str = "demo", *, whole: bool = True) -> torch.Tensor:
    """Rows of one part, five a shard, whose activations say which they are."""
    numbers = torch.arange(rows, dtype=torch.int32)
    activations = (1000.0 * part.number + numbers).unsqueeze(1).expand(rows, D).contiguous()
    writer = ShardWriter(
        part.folder(shards), D, Hook(3, "resid_post"), model, dtype="float32", rows_per_shard=5
    )
    writer.append(activations, numbers, numbers * part.of + part.number, numbers)
    if whole:
        writer.close()
    else:
        writer.abandon()
    return activations


def test_each_part_takes_every_nth_text(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(11)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    corpus = open_corpus(tmp_path / "a.txt")
    parts = [Part(number, 3) for number in range(3)]
    taken = [[text for text, _ in part.take(corpus)] for part in parts]
    assert taken == [texts[number::3] for number in range(3)]
    assert [list(part.take(texts)) for part in parts] == taken


def test_joined_parts_are_read_as_one_harvest(tmp_path: Path) -> None:
    wanted = torch.cat([_write(tmp_path, Part(number, 3), rows) for number, rows in enumerate((12, 5, 8))])
    assert join_parts(tmp_path, 3) == 25
    reader = ShardReader(tmp_path)
    assert (len(reader), reader.complete) == (25, True)
    assert torch.equal(reader[:].activations, wanted)
    assert torch.equal(reader.activations(10, 20), wanted[10:20])
    assert len(set(reader[:].sequence.tolist())) == 25


def test_parts_are_joined_only_when_all_are_whole_and_alike(tmp_path: Path) -> None:
    _write(tmp_path / "a", Part(0, 2), 7)
    _write(tmp_path / "a", Part(1, 2), 7, whole=False)
    with pytest.raises(ConfigError, match=r"whole harvest in .*part-1-of-2"):
        join_parts(tmp_path / "a", 2)
    _write(tmp_path / "b", Part(0, 2), 7)
    _write(tmp_path / "b", Part(1, 2), 7, model="another")
    with pytest.raises(ConfigError, match="parts of one harvest"):
        join_parts(tmp_path / "b", 2)
    assert not list(tmp_path.glob(f"*/{INDEX}"))


@pytest.mark.parametrize(("written", "wanted", "holds"), [(2, 3, 2), (2, 1, 2), (1, 2, 1)])
def test_a_harvest_goes_on_with_as_many_parts_as_it_began(
    written: int, wanted: int, holds: int, tmp_path: Path
) -> None:
    _write(tmp_path, Part(0, written), 7, whole=False)
    check_parts(tmp_path, written)
    with pytest.raises(ConfigError, match=f"in {wanted} parts?, .* holds one of {holds}"):
        check_parts(tmp_path, wanted)


@pytest.mark.parametrize("shards", [[3], [{"rows": 1}], [{"file": 7}], {"file": "shard-00000.safetensors"}])
def test_an_index_that_names_no_files_is_refused(shards: object, tmp_path: Path) -> None:
    _write(tmp_path, Part(0, 1), 7)
    (tmp_path / INDEX).write_text(json.dumps({"shards": shards}))
    with pytest.raises(CheckpointError, match="string `file`"):
        ShardReader(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    _write(tmp_path / "other", Part(0, 1), 7)
    (tmp_path / "acts").mkdir()
    outside = {"file": "../other/shard-00000.safetensors", "rows": 5}
    (tmp_path / "acts" / INDEX).write_text(json.dumps({"shards": [outside]}))
    with pytest.raises(CheckpointError, match="inside its folder"):
        ShardReader(tmp_path / "acts")
