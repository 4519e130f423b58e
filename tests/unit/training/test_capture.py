from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steerserve.errors import ConfigError, IncompatibleError
from steerserve.sae import Hook
from steerserve.training.capture import Capture
from steerserve.training.shard_file import Rows
from steerserve.training.shard_writer import ShardWriter
from steerserve.training.shards import ShardReader

D = 4
BOS = 0
HOOKS = {1: Hook(0, "resid_post"), 3: Hook(2, "resid_post")}
SEQUENCES = [[BOS, *range(first, first + length)] for first, length in ((10, 5), (30, 1), (40, 9), (60, 7))]


def _stream(sequence: int, position: int, point: int) -> torch.Tensor:
    """What the model would have there: any function of the place."""
    return torch.tensor([sequence, position, point, sequence * position]).float() + 0.25


def _opened(folder: Path, resume: bool = False, capacity: int = 64) -> Capture:
    capture = Capture(HOOKS, frozenset({BOS}))
    writers = {
        point: ShardWriter(
            folder / f"resid_post.{hook.layer}",
            D,
            hook,
            "demo",
            dtype="float32",
            rows_per_shard=5,
            resume=resume,
        )
        for point, hook in HOOKS.items()
    }
    capture.open(writers, capacity)
    return capture


def _begin(capture: Capture, sequences: list[list[int]], request: int = 0, first: int = 0) -> bool:
    flat = np.array([token for sequence in sequences for token in sequence], dtype=np.int32)
    return capture.begin_batch(request, first, list(map(len, sequences)), flat.tobytes())


def _steps(sequences: list[list[int]], seed: int) -> Iterator[list[tuple[int, int, int]]]:
    """Steps of a scheduler that takes pieces of several sequences in any order: (sequence, start, stop)."""
    rng = random.Random(seed)
    done = [0] * len(sequences)
    while open_ones := [i for i, sequence in enumerate(sequences) if done[i] < len(sequence)]:
        step = []
        for i in rng.sample(open_ones, rng.randint(1, len(open_ones))):
            if done[i] and rng.random() < 0.2:
                done[i] = 0  # preempted: it begins again
            stop = rng.randint(done[i] + 1, len(sequences[i]))
            step.append((i, done[i], stop))
            done[i] = stop
        yield step


def _run(
    capture: Capture,
    sequences: list[list[int]],
    seed: int,
    *,
    request: int = 0,
    first: int = 0,
    sampled: bool = False,
) -> None:
    for step in _steps(sequences, seed):
        names = [f"{request + i}-abc" for i, _, _ in step]
        # vLLM may run a token more than was asked, before it knows.
        more = [int(sampled and stop == len(sequences[i])) for i, _, stop in step]
        scheduled = np.array(
            [stop - start + extra for (_, start, stop), extra in zip(step, more, strict=True)], dtype=np.int32
        )
        computed = np.array([start for _, start, _ in step], dtype=np.int32)
        ids, places = [], []
        for (i, start, stop), extra in zip(step, more, strict=True):
            ids += sequences[i][start:stop] + [99] * extra
            places += [(first + i, position) for position in range(start, stop + extra)]
        capture.begin_step(names, scheduled, computed, np.array([*ids, 7, 7]))
        for point in (0, *HOOKS):
            stream = torch.stack([_stream(*place, point) for place in places] + [torch.full((D,), 1e9)] * 2)
            # The stream is what the op is given as two summands, or as one.
            part = torch.randn_like(stream) if point == 3 else None
            capture.take(point, stream if part is None else stream - part, part)
        capture.end_step()


def _check(folder: Path) -> None:
    for point, hook in HOOKS.items():
        reader = ShardReader(folder / f"resid_post.{hook.layer}")
        assert (reader.complete, reader.hook) == (True, hook)
        rows = reader[:]
        places = [(i, p) for i, sequence in enumerate(SEQUENCES) for p in range(1, len(sequence))]
        assert list(zip(rows.sequence.tolist(), rows.position.tolist(), strict=True)) == places
        assert rows.tokens.tolist() == [SEQUENCES[i][p] for i, p in places]
        torch.testing.assert_close(
            rows.activations, torch.stack([_stream(*place, point) for place in places])
        )


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_what_is_written_does_not_depend_on_the_scheduler(seed: int, sampled: bool, tmp_path: Path) -> None:
    # Too small for the second batch, as for a sequence that is longer than was planned for.
    capture = _opened(tmp_path, capacity=8)
    for start, stop in ((0, 2), (2, 4)):
        some = SEQUENCES[start:stop]
        assert _begin(capture, some, request=100 + start, first=start)
        _run(capture, some, seed, request=100 + start, first=start, sampled=sampled)
        capture.end_batch()
    assert capture.close() == len(HOOKS) * sum(len(sequence) - 1 for sequence in SEQUENCES)
    _check(tmp_path)


@pytest.mark.parametrize("cut", [(0, 0), (1, 0), (2, 3), (4, 4), (5, 5)])
def test_a_resumed_harvest_runs_what_is_not_stored_and_no_more(cut: tuple[int, int], tmp_path: Path) -> None:
    first = _opened(tmp_path)
    assert _begin(first, SEQUENCES)
    _run(first, SEQUENCES, seed=1)
    first.end_batch()
    first.close()
    stored = []
    for kept, hook in zip(cut, HOOKS.values(), strict=True):
        folder = tmp_path / f"resid_post.{hook.layer}"
        (folder / "index.json").unlink()
        for path in sorted(folder.glob("shard-*"))[kept:]:
            path.unlink()
        stored.append(min(22, 5 * kept))
    again = _opened(tmp_path, resume=True)
    row = 0
    for number, sequence in enumerate(SEQUENCES):
        row += len(sequence) - 1
        needed = _begin(again, [sequence], request=number, first=number)
        assert needed == (row > min(stored))
        if needed:
            _run(again, [sequence], seed=2, request=number, first=number)
        again.end_batch()
    again.close()
    _check(tmp_path)


def test_a_token_that_was_never_run_is_missed(tmp_path: Path) -> None:
    capture = _opened(tmp_path)
    _begin(capture, SEQUENCES)
    _run(capture, SEQUENCES[:3], seed=0)
    with pytest.raises(IncompatibleError, match="left out 7"):
        capture.end_batch()


def test_tokens_that_were_not_announced_are_refused(tmp_path: Path) -> None:
    capture = _opened(tmp_path)
    _begin(capture, SEQUENCES)
    with pytest.raises(IncompatibleError, match="other tokens"):
        capture.begin_step(["1-x"], np.array([2]), np.array([0]), np.array([BOS, 31]))


def test_nothing_is_kept_before_a_harvest_begins(tmp_path: Path) -> None:
    capture = Capture(HOOKS, frozenset())
    _run(capture, SEQUENCES, seed=0)
    capture.end_batch()
    assert capture.close() == 0


def test_an_activation_that_is_not_finite_ends_the_harvest_behind_whole_batches(tmp_path: Path) -> None:
    capture = _opened(tmp_path)
    _begin(capture, SEQUENCES)
    _run(capture, SEQUENCES, seed=0)
    capture.end_batch()
    _begin(capture, SEQUENCES[:1], request=4, first=4)
    capture.begin_step(["4-x"], np.array([6]), np.array([0]), np.array(SEQUENCES[0]))
    for point in HOOKS:
        capture.take(point, torch.full((6, D), float("nan")), None)
    capture.end_step()
    with pytest.raises(ConfigError, match="finite"):
        capture.end_batch()
    capture.abandon()
    assert len(ShardReader(tmp_path / "resid_post.0")) == 20


def _rows(folder: Path) -> Rows:
    return ShardReader(folder)[:]


def test_bfloat16_is_rounded_from_the_sum_not_from_its_parts(tmp_path: Path) -> None:
    capture = Capture({1: HOOKS[1]}, frozenset())
    settings: dict[str, Any] = {"dtype": "bfloat16"}
    capture.open({1: ShardWriter(tmp_path, D, HOOKS[1], "demo", **settings)}, 8)
    capture.begin_batch(0, 0, [1], np.array([5], dtype=np.int32).tobytes())
    capture.begin_step(["0-x"], np.array([1]), np.array([0]), np.array([5]))
    one, other = torch.full((1, D), 256.0).bfloat16(), torch.full((1, D), 1.5).bfloat16()
    capture.take(1, one, other)
    capture.end_batch()
    capture.close()
    assert torch.equal(_rows(tmp_path).activations, (one.float() + other.float()).bfloat16())
