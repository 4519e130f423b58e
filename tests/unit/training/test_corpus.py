from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steerserve.errors import ConfigError, SteerserveError
from steerserve.training.corpus import open_corpus

TEXTS = ["one", "zwei Wörter", "", "drei\nZeilen", "  ", "vier"]
KEPT = ["one", "zwei Wörter", "drei\nZeilen", "vier"]
Write = Callable[[Path, list[Any]], Path]


def _jsonl(folder: Path, texts: list[Any]) -> Path:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": 3}) + "\n" for text in texts))
    return path


def _parquet(folder: Path, texts: list[Any]) -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), folder / "a.parquet")
    return folder / "a.parquet"


def _parquet_folder(folder: Path, texts: list[Any]) -> Path:
    (folder / "data").mkdir()
    for number, part in enumerate((texts[:2], texts[2:])):
        table = pa.table({"text": pa.array(part, pa.large_string())})
        pq.write_table(table, folder / "data" / f"train-0000{number}-of-00002.parquet", row_group_size=2)
    return folder


def _saved(folder: Path, texts: list[Any]) -> Path:
    datasets.Dataset.from_dict({"text": texts, "id": list(range(len(texts)))}).save_to_disk(
        folder / "saved", num_shards=min(2, len(texts))
    )
    return folder / "saved"


def _arrow_file(folder: Path, texts: list[Any]) -> Path:
    table = pa.table({"text": texts})
    with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return folder / "a.arrow"


WRITERS: dict[str, Write] = {
    "jsonl": _jsonl,
    "parquet": _parquet,
    "folder of parquet": _parquet_folder,
    "save_to_disk": _saved,
    "arrow": _arrow_file,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_kind_of_input_gives_its_texts_in_order_and_leaves_out_empty_ones(
    write: Write, tmp_path: Path
) -> None:
    corpus = open_corpus(write(tmp_path, TEXTS))
    for _ in range(2):
        found = list(corpus)
        assert [text for text, _ in found] == KEPT
        reads = [read for _, read in found]
        assert reads == sorted(reads)
        assert 0 < reads[0] <= reads[-1] <= corpus.size
    assert reads[-1] > 0.95 * corpus.size


def test_lines_are_texts_whatever_ends_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\n \nzwei Wörter\u2028noch eins\nlast".encode())
    corpus = open_corpus(tmp_path / "a.txt")
    assert [text for text, _ in corpus] == ["one", "zwei Wörter\u2028noch eins", "last"]
    assert [read for _, read in corpus][-1] == corpus.size


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_another_field_is_read_by_its_name(write: Write, tmp_path: Path) -> None:
    path = write(tmp_path, ["one"])
    with pytest.raises(ConfigError, match="`body`"):
        list(open_corpus(path, "body"))
    if write is _jsonl:
        path.write_text('{"body": "one"}\n')
        assert [text for text, _ in open_corpus(path, "body")] == ["one"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "one"}\n{"txt": "two"}\n', "line 2"),
        (b'{"text": "one"}\n\nnot json\n', "line 3"),
        (b'{"text": null}\n', "line 1"),
        (b'["text"]\n', "line 1"),
        (b'{"text": "\\ud800"}\n', "line 1"),
        (b'{"text": "one"}\n{"text": "\xff"}\n', "UTF-8.* line 2"),
        (b"[" * 100_000 + b"\n", "line 1"),
    ],
)
def test_a_line_that_is_not_what_it_should_be_is_named(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=f"{says} of .*a.jsonl"):
        list(open_corpus(tmp_path / "a.jsonl"))


def test_what_comes_before_a_bad_line_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nnot json\n')
    texts = iter(open_corpus(tmp_path / "a.jsonl"))
    assert next(texts).text == "one"
    with pytest.raises(ConfigError, match="line 2"):
        next(texts)


def test_a_file_without_line_breaks_is_not_read_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(2**36)
    with pytest.raises(ConfigError, match="line 1"):
        next(iter(open_corpus(tmp_path / "a.txt")))


@pytest.mark.parametrize("write", [_parquet, _parquet_folder, _arrow_file, _saved])
def test_a_row_without_a_text_is_named(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got None - at row [12] of .*(arrow|parquet)"):
        list(open_corpus(write(tmp_path, ["one", None])))


def test_a_column_that_holds_no_strings_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"strings in the column `id`, got int64 - in .*a.parquet"):
        open_corpus(_parquet(tmp_path, ["one"]), "id")


@pytest.mark.parametrize("write", [_parquet, _arrow_file, _saved])
@pytest.mark.parametrize("left", [0, 9, 0.5])
def test_a_damaged_table_is_named(write: Write, left: float, tmp_path: Path) -> None:
    path = write(tmp_path, ["some text"] * 500)
    file = path if path.is_file() else sorted(path.glob("*.arrow"))[-1]
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content)) if 0 < left < 1 else int(left)])
    with pytest.raises(ConfigError, match=file.name):
        list(open_corpus(path))


def test_a_dataset_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    split = datasets.Dataset.from_dict({"text": ["one"]})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"one of \['train', 'test'\]"):
        open_corpus(tmp_path / "saved")
    assert [text for text, _ in open_corpus(tmp_path / "saved" / "test")] == ["one"]


def test_a_dataset_never_reads_outside_its_folder(tmp_path: Path) -> None:
    path = _saved(tmp_path, ["one"])
    (tmp_path / "secret.arrow").write_bytes(b"")
    (path / "state.json").write_text('{"_data_files": [{"filename": "../secret.arrow"}]}')
    with pytest.raises(SteerserveError, match="leads out"):
        open_corpus(path)


@pytest.mark.parametrize("name", ["missing.txt", "missing.parquet", "a.csv", "empty"])
def test_what_is_no_corpus_is_refused_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\none\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="expected"):
        open_corpus(tmp_path / name)
