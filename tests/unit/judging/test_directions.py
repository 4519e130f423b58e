from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from steerserve.judging.directions import diffmean, make_directions
from steerserve.judging.hooked import HookedModel
from steerserve.judging.scores import auroc
from steerserve.judging.texts import TokenTable, collect, from_shards
from steerserve.sae import Hook, read_direction, write_direction
from steerserve.training.shard_writer import ShardWriter
from steerserve.training.shards import ShardReader

from .conftest import LAYER, WORDS

HOOK = Hook(LAYER, "resid_post")


def table(seed: int) -> TokenTable:
    """Two labels that differ along the first axis alone; the third axis is louder and says nothing."""
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(seed))
    text = torch.arange(300) // 10
    label = text % 2
    x[:, 0] += 3.0 * label
    x[:, 2] *= 10
    return TokenTable(x, text, label, ("low", "high"), 30)


def test_diffmean_is_the_difference_of_numpys_means() -> None:
    data = table(0)
    x, inside = data.x.double().numpy(), (data.label == 1).numpy()
    np.testing.assert_allclose(
        diffmean(data.x, data.label == 1), x[inside].mean(0) - x[~inside].mean(0), rtol=1e-6
    )


@pytest.mark.parametrize("method", ["diffmean", "probe"])
def test_a_planted_axis_is_found_and_its_statistics_are_of_the_projection(method: str) -> None:
    choose, measure = table(0), table(1)
    low, high = make_directions(choose, measure, HOOK, method)  # type: ignore[arg-type]
    assert float(high.vector.norm()) == pytest.approx(1.0)
    along = choose.x @ high.vector
    assert high.statistics["max_activation"] == pytest.approx(float(along.max()), rel=1e-5)
    assert high.statistics["mean_inside"] == pytest.approx(float(along[choose.label == 1].mean()), rel=1e-4)
    assert high.statistics["auroc"] == pytest.approx(auroc(measure.x @ high.vector, measure.label == 1))
    assert high.statistics["auroc_texts"] > 0.9
    torch.testing.assert_close(low.vector, -high.vector, atol=1e-3, rtol=0)


def test_a_probe_turns_away_from_what_is_loud_and_says_nothing() -> None:
    (_, found) = make_directions(table(0), table(1), HOOK, "probe")
    (_, mean) = make_directions(table(0), table(1), HOOK, "diffmean")
    assert float(found.vector[0]) > 0.99
    assert found.statistics["auroc"] > mean.statistics["auroc"]


def test_the_server_reads_back_what_is_written(tmp_path: Path) -> None:
    (_, made) = make_directions(table(0), table(1), HOOK, "diffmean")
    write_direction(tmp_path / "high.safetensors", made)
    found = read_direction(tmp_path / "high.safetensors")
    assert (found.name, found.hook, dict(found.statistics)) == ("high", HOOK, dict(made.statistics))
    torch.testing.assert_close(found.vector, made.vector)


def test_a_harvest_of_the_same_texts_gives_the_same_directions(model: HookedModel, tmp_path: Path) -> None:
    texts = [(word, label) for word in WORDS for label in ("a", "b")]
    read = collect(model, texts, ("a", "b"), limit=99)
    order = torch.argsort(read.text, stable=True)
    with ShardWriter(tmp_path / "shards", 64, HOOK, "tiny", dtype="float32") as writer:
        count = len(order)
        writer.append(read.x[order], torch.zeros(count), read.text[order], torch.arange(count))
    harvested = from_shards(ShardReader(tmp_path / "shards"), texts, ("a", "b"))
    torch.testing.assert_close(harvested.x, read.x[order])
    assert harvested.label.tolist() == read.label[order].tolist()
    torch.testing.assert_close(harvested.pooled(), read.pooled())


def test_a_table_is_divided_by_whole_texts_of_every_label() -> None:
    data = table(0)
    choose, measure = data.divided(0.2, 3)
    assert not set(choose.text.tolist()) & set(measure.text.tolist())
    assert len(choose.x) + len(measure.x) == 300
    assert [len(measure.text[measure.label == at].unique()) for at in (0, 1)] == [3, 3]
