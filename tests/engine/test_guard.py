"""An engine whose model would be steered wrongly in silence does not start, whatever its settings say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.errors import IncompatibleError
from steerserve_vllm import guard
from steerserve_vllm.guard import Sight, _check_classes, check_stream
from tests.support import fork_server
from tests.support.one import OneAtATime


@pytest.mark.parametrize(
    ("fault", "ranks", "says"),
    [
        ("partial_sums", 2, "expected 2 tensor-parallel ranks to see one stream, at resid_post.2 rank 1"),
        ("fewer_rows", 1, "expected a row of the stream for each of 11 tokens, got 6 at resid_post.2"),
    ],
)  # fmt: skip
def test_a_model_that_splits_or_defers_the_stream_does_not_start(
    running: OneAtATime,
    models: Callable[[str], Path],
    assets: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fault: str,
    ranks: int,
    says: str,
) -> None:
    running.stop()
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, range(ranks))))
    words = [fault, str(models("llama")), str(assets["saes"]["jump"][0]), str(ranks)]
    done = fork_server.run("-m", "tests.support.faulty", *words, folder=tmp_path, timeout=240)
    assert done.returncode != 0, f"it started: {done.stdout[-500:]}\n{done.stderr[-6000:]}"
    assert says in done.stderr, done.stderr[-4000:]


class DeepseekV32ForCausalLM(torch.nn.Linear):
    """Named as vLLM's, which is what is looked at, also inside of a model that another one builds."""


def test_a_part_of_a_model_that_defers_the_all_reduce_is_known_by_its_class() -> None:
    _check_classes(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    inside = torch.nn.Sequential(torch.nn.Linear(2, 2), type("Steered", (DeepseekV32ForCausalLM,), {})(2, 2))
    with pytest.raises(IncompatibleError, match="DeepseekV32ForCausalLM: its layers leave the all-reduce"):
        _check_classes(inside)


def _sight(rows: int, added: int | None = None) -> list[Sight]:
    return [Sight(torch.ones(rows, 4), None if added is None else torch.ones(added, 4))]


def test_a_stream_that_is_whole_passes() -> None:
    check_stream({2: _sight(5), 3: _sight(5, 5)}, 5, [2, 3])


@pytest.mark.parametrize(
    ("seen", "says"),
    [
        ({2: _sight(5)}, r"reach each hook point once, it did so 0 times at resid_post\.2"),
        ({2: _sight(5) * 2, 3: _sight(5)}, r"it did so 2 times at resid_post\.1"),
        ({2: _sight(5), 3: _sight(5), 1: []}, r"it did so 0 times at resid_post\.0"),
        ({2: _sight(5), 3: _sight(5, 3)}, r"each of 5 tokens, got 3 at resid_post\.2"),
        ({2: _sight(10), 3: _sight(5)}, r"each of 5 tokens, got 10 at resid_post\.1"),
    ],
)
def test_what_a_hook_point_must_not_see_is_refused_by_name(seen: dict[int, list[Sight]], says: str) -> None:
    with pytest.raises(IncompatibleError, match=says):
        check_stream(seen, 5, [2, 3])


def test_what_is_no_number_does_not_pass_for_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [torch.full((5, 4), 3e38), torch.ones(5, 4)]
    monkeypatch.setattr(guard, "_gathered", lambda tensor, group, ranks: seen)
    with pytest.raises(IncompatibleError, match="rank 1 sees another than rank 0"):
        guard._check_same(2, seen[0], None, 2)


def test_attention_adds_nothing_while_the_stream_is_looked_at() -> None:
    """vLLM's CPU backend leaves the memory as it was where there is nothing to attend to."""

    class Backend:
        def forward(self, output: torch.Tensor) -> torch.Tensor:
            return output

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    backend: Any = Backend()
    model.impl = backend
    with guard._without_attention(model):
        assert not backend.forward(output=torch.full((2, 2), torch.inf)).any()
    assert backend.forward(torch.ones(2)).all()
