from __future__ import annotations

import pytest
import torch

from steerserve.training import shuffle
from steerserve.training.shuffle import shuffled_batches


class Numbered:
    """Row i holds the number i."""

    d_in = 1

    def __init__(self) -> None:
        self.largest = 0

    def activations(self, start: int, stop: int) -> torch.Tensor:
        self.largest = max(self.largest, stop - start)
        return torch.arange(start, stop).float().unsqueeze(1)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "_BLOCK", 8)
    monkeypatch.setattr(shuffle, "_WINDOW_BYTES", 4 * 8 * 3)


def _numbers(**settings: int) -> list[list[int]]:
    given = {"rows": 101, "batch_size": 10, "seed": 0, "epochs": 1, **settings}
    rows, batch_size = given.pop("rows"), given.pop("batch_size")
    return [
        batch.flatten().int().tolist() for batch in shuffled_batches(Numbered(), rows, batch_size, **given)
    ]


def test_an_epoch_holds_every_row_once_but_for_an_incomplete_last_batch() -> None:
    batches = _numbers()
    seen = [number for batch in batches for number in batch]
    assert [len(batch) for batch in batches] == [10] * 10
    assert len(set(seen)) == 100
    assert set(seen) <= set(range(101))


def test_the_seed_alone_decides_the_order() -> None:
    assert _numbers(seed=3) == _numbers(seed=3)
    assert _numbers(seed=3) != _numbers(seed=4)


def test_each_epoch_has_an_order_of_its_own() -> None:
    batches = _numbers(epochs=2)
    assert batches[:10] != batches[10:]


@pytest.mark.parametrize("skip", range(0, 31, 3))
def test_skipping_resumes_exactly(skip: int) -> None:
    assert _numbers(epochs=3, skip=skip) == _numbers(epochs=3)[skip:]


def test_no_row_beyond_the_wanted_ones_is_read() -> None:
    assert max(max(batch) for batch in _numbers(rows=50)) < 50


def test_no_read_is_larger_than_a_block() -> None:
    source = Numbered()
    list(shuffled_batches(source, 101, 10, seed=0, epochs=1))
    assert source.largest == 8


@pytest.mark.parametrize(("d_in", "rows"), [(64, 2048), (256, 2048), (1024, 512), (4096, 128), (65_536, 64)])
def test_a_window_holds_many_blocks_even_where_rows_are_long(
    d_in: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    source = Numbered()
    source.d_in = d_in
    next(shuffled_batches(source, 5000, 10, seed=0, epochs=1))
    assert source.largest == rows
