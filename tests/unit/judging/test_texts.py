from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steerserve.errors import ConfigError
from steerserve.judging.hooked import HookedModel
from steerserve.judging.texts import collect, labels_of, read_labelled, read_prompts, split

from .conftest import WORDS


def written(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_texts_come_with_their_labels_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    rows = ({"text": "one", "label": "a"}, "", {"text": "", "label": "b"}, {"text": "two", "label": "b"})
    assert read_labelled(written(tmp_path / "t.jsonl", *rows), labelled=True) == [("one", "a"), ("two", "b")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "one"}, {"text": "two", "label": "b"}], "string `label` beside `text` - at text 1"),
        ([{"text": "one", "label": "a"}], "at least two different labels"),
        (["not json"], "at line 1"),
        ([{"text": "one", "label": "a"}, {"text": 7}], "at line 2"),
        ([{"text": "one", "label": 3}], "a string `label` - at line 1"),
        ([""], "expected texts, found none"),
    ],
)
def test_a_file_that_is_not_labelled_texts_is_refused_by_its_line(
    rows: list[object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_labelled(written(tmp_path / "t.jsonl", *rows), labelled=True)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found none at"):
        read_labelled(tmp_path / "none.jsonl", labelled=False)
    with pytest.raises(ConfigError, match="expected a file of prompts"):
        read_prompts(tmp_path / "none.txt")


def test_prompts_are_lines_or_json_lines(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path / "p.txt", "He said", "", "She said")) == ["He said", "She said"]
    assert read_prompts(written(tmp_path / "p.jsonl", {"text": "He\nsaid"})) == ["He\nsaid"]


def test_both_halves_hold_every_label_and_no_text_twice() -> None:
    texts = [(f"text {at}", "abc"[at % 3]) for at in range(30)]
    first, second = split(texts, 0.3, 0)
    assert sorted(first + second) == sorted(texts)
    assert labels_of(first) == labels_of(second) == ("a", "b", "c")
    assert len(second) == 9
    assert split(texts, 0.3, 0) == (first, second) != split(texts, 0.3, 1)


def test_collected_tokens_are_the_ordinary_ones_of_their_own_text(model: HookedModel) -> None:
    texts = [(word, label) for word, label in zip(WORDS, "bab", strict=True)]
    told: list[int] = []
    found = collect(model, texts, ("a", "b"), limit=6, progress=told.append)
    assert sum(told) == 3
    assert torch.bincount(found.text).tolist() == [5, 3, 5]
    assert found.text_label().tolist() == [1, 0, 1]
    for at, word in enumerate(WORDS):
        ids, mask = model.batch([model.encode(word, 6)])
        torch.testing.assert_close(found.x[found.text == at], model.stream(ids, mask)[0, 1:])
    torch.testing.assert_close(found.pooled()[1], found.x[found.text == 1].mean(0))


def test_a_budget_of_tokens_ends_with_the_text_that_reaches_it(model: HookedModel) -> None:
    found = collect(model, [(word, None) for word in WORDS], (), limit=99, tokens=8)
    assert (found.texts, len(found.x)) == (2, 10)
