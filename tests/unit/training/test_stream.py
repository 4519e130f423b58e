from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from steerserve.errors import ConfigError
from steerserve.sae import Hook
from steerserve.training import stream
from steerserve.training.settings import TrainSettings
from steerserve.training.shard_writer import ShardWriter
from steerserve.training.stream import LeftError, ShardStream
from steerserve.training.trainer import train

D = 4
SHARD = 10
HOOK = Hook(3, "resid_post")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_POOL_BYTES", 4 * D * 40)


@contextmanager
def _streaming(
    folder: Path,
    rows: int,
    *,
    written: int | None = None,
    pause: float = 0.0,
    failure: Exception | None = None,
) -> Iterator[tuple[ShardStream, Callable[[], int]]]:
    """A stream of rows that hold their own number, and how many shards lay on disk at the most."""
    source, most = ShardStream(folder, rows, ahead=20), 0

    def write() -> None:
        nonlocal most
        writer = ShardWriter(folder, D, HOOK, "demo", dtype="float32", rows_per_shard=SHARD)
        try:
            for first in range(0, written if written is not None else rows + 1000, 7):
                numbers = torch.arange(first, first + 7, dtype=torch.int32)
                writer.append(numbers.float().unsqueeze(1).expand(-1, D), numbers, numbers, numbers)
                most = max(most, len(list(folder.glob("shard-*"))))
                time.sleep(pause)
                source.hold_back()
            if failure is not None:
                raise failure
            writer.close()
            source.end()
        except LeftError:
            source.end()
        except Exception as error:
            source.end(error)
        finally:
            writer.abandon()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield source, lambda: most
    finally:
        source.leave()
        thread.join()


def _numbers(source: ShardStream, batch_size: int = 8, **settings: int) -> list[list[int]]:
    batches = source.shuffled_batches(batch_size, settings.pop("seed", 0), 1, **settings)  # type: ignore[arg-type]
    return [batch[:, 0].int().tolist() for batch in batches]


def test_every_row_comes_once_though_few_of_them_are_ever_on_disk(tmp_path: Path) -> None:
    with _streaming(tmp_path, 500) as (source, most):
        batches = _numbers(source)
        assert (len(source), source.d_in, source.hook) == (500, D, HOOK)
    assert [len(batch) for batch in batches] == [8] * 62
    seen = [number for batch in batches for number in batch]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(500))
    # Of 50 and more: those of the pool, those ahead, and one that is being read.
    assert most() <= (40 + 20) // SHARD + 3


def test_a_batch_mixes_rows_from_far_apart(tmp_path: Path) -> None:
    with _streaming(tmp_path, 500) as (source, _):
        batches = _numbers(source)
    spread = [max(batch) - min(batch) for batch in batches]
    assert sorted(spread)[len(spread) // 2] > 3 * 8


@pytest.mark.parametrize("pause", [0.0, 0.002])
def test_the_order_is_decided_by_the_seed_and_never_by_who_is_faster(pause: float, tmp_path: Path) -> None:
    orders = []
    for number, seed in enumerate((3, 3, 4)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with _streaming(folder, 200, pause=pause * number) as (source, _):
            orders.append(_numbers(source, seed=seed))
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_a_look_at_the_first_batch_takes_nothing_away_and_skipping_resumes(tmp_path: Path) -> None:
    with _streaming(tmp_path, 200) as (source, _):
        first = next(source.shuffled_batches(20, 0, 1, rows=150))
        assert len(first) == 20
        whole = _numbers(source, rows=150)
    assert set(range(200)) >= {n for batch in whole for n in batch}
    assert len(whole) == 150 // 8
    again = tmp_path / "again"
    again.mkdir()
    with _streaming(again, 200) as (source, _):
        assert _numbers(source, rows=150, skip=5) == whole[5:]


def test_rows_kept_for_evaluation_are_there_when_the_batches_are_done(tmp_path: Path) -> None:
    with _streaming(tmp_path, 200) as (source, _):
        trained = {number for batch in _numbers(source, rows=150) for number in batch}
        for _ in range(2):
            held_out = source.activations(150, 200)[:, 0].int().tolist()
            assert held_out == list(range(150, 200))
        assert not trained & set(held_out)
        with pytest.raises(ConfigError, match="gone"):
            source.activations(0, 10)


def test_a_harvest_that_ends_too_early_is_said(tmp_path: Path) -> None:
    with _streaming(tmp_path, 500, written=70) as (source, _), pytest.raises(ConfigError, match="gave 70"):
        _numbers(source)


def test_a_harvest_that_fails_is_said(tmp_path: Path) -> None:
    failure = ConfigError("line 7 of a.jsonl")
    with (
        _streaming(tmp_path, 500, written=70, failure=failure) as (source, _),
        pytest.raises(ConfigError, match="line 7"),
    ):
        _numbers(source)


def test_a_second_epoch_is_refused(tmp_path: Path) -> None:
    with _streaming(tmp_path, 100) as (source, _), pytest.raises(ConfigError, match="one epoch"):
        next(source.shuffled_batches(8, 0, 2))


def test_the_trainer_takes_a_stream_for_a_harvest(tmp_path: Path) -> None:
    settings = TrainSettings(d_sae=16, k=2, tokens=400, batch_size=20, held_out=50)
    with _streaming(tmp_path, 450) as (source, _):
        trained = train(source, settings)  # type: ignore[arg-type]
        assert len(source.activations(400, 450)) == 50
    assert trained.sae.encode(torch.randn(3, D)).shape == (3, 16)
