"""Dead features begin anew at what the living ones miss."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steerserve.sae.architectures.resample import missed_directions
from steerserve.training.distributed import World
from steerserve.training.run import Run
from steerserve.training.settings import TrainSettings, parse_settings

from .processes import torchrun

D, F, BATCH, STEPS = 16, 24, 64, 40
RESAMPLED = ("standard", "gated", "jumprelu")
BURIED = 4


def settings(name: str, **changes: object) -> TrainSettings:
    small = {"d_sae": F, "batch_size": BATCH, "tokens": STEPS * BATCH, "dead_after": 1, "resample_every": 2}
    return parse_settings({"architecture": name, "device": "cpu", "warm_up": 0, **small, **changes})


def stream(steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        yield torch.randn(BATCH, D, generator=generator) / D**0.5


def buried(name: str, world: World | None = None, **changes: object) -> Run:
    """A run whose first four features cannot fire."""
    run = Run(settings(name, **changes), torch.zeros(D), 1.0, world or World())
    run.sae.parameters["bias"][:BURIED] = -50.0
    return run


def rows(run: Run) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.sae.parameters.items() if name != "b_dec"}


@pytest.mark.parametrize("name", RESAMPLED)
def test_dead_features_fire_again_and_no_other_row_changes(name: str) -> None:
    run, untouched = buried(name), buried(name, resample_every=0)
    first, second, third = stream(3)
    for x in (first, second):
        run.advance(x)
        untouched.advance(x)
    anew, kept = rows(run), rows(untouched)
    assert all(torch.equal(anew[key][BURIED:], kept[key][BURIED:]) for key in anew)
    assert not untouched.advance(third).fired[:BURIED].any()
    assert run.advance(third).fired[:BURIED].all()


@pytest.mark.parametrize("name", RESAMPLED)
def test_new_rows_point_where_the_others_miss_and_the_optimizer_has_forgotten(name: str) -> None:
    run, still = buried(name), buried(name, resample_every=0)
    batches = list(stream(2))
    for x in batches:
        run.advance(x)
        still.advance(x)
    p = run.sae.parameters
    seed = run.settings.seed * 1_000_003 + 2
    wanted = missed_directions(still.sae, batches[1], BURIED, seed)
    found = torch.nn.functional.normalize(p["decoder"][:BURIED], dim=-1)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.nn.functional.normalize(p["encoder"][:BURIED], dim=-1), wanted)
    state = run.state()
    for key in ("exp_avg", "exp_avg_sq"):
        assert not state[f"adam.encoder.{key}"][:BURIED].any()
        assert state[f"adam.encoder.{key}"][BURIED:].any()
    assert not state["silent"][:BURIED].any()


def test_outliers_that_all_point_one_way_are_begun_at_once() -> None:
    run = Run(settings("standard"), torch.zeros(D), 1.0, World())
    run.sae.parameters["bias"].fill_(-500.0)
    x = torch.randn(BATCH, D, generator=torch.Generator().manual_seed(5)) / D**0.5
    outlier = torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(6)), dim=0)
    x[::2] += 40 * outlier
    found = missed_directions(run.sae, x, 6, seed=0)
    cosines = found @ found.T - torch.eye(6)
    assert found.norm(dim=1).tolist() == pytest.approx([1.0] * 6)
    assert cosines.max() <= 0.5
    assert (found @ outlier > 0.9).sum() == 1


def test_where_all_errors_are_alike_one_feature_begins_anew_and_the_others_wait() -> None:
    run = Run(settings("standard"), torch.zeros(D), 1.0, World())
    with torch.no_grad():
        run.sae.parameters["bias"].fill_(-50.0)
        run.sae.parameters["bias"][-1] = 1.0
        run.sae.parameters["encoder"][-1] = 0.0
    x = torch.randn(D, generator=torch.Generator().manual_seed(5)).expand(BATCH, D).contiguous()
    assert missed_directions(run.sae, x, 4, seed=0).any(dim=1).tolist() == [True, False, False, False]
    for _ in range(2):
        run.advance(x)
    assert int((run.sae.parameters["bias"] < -40).sum()) == F - 2


def test_errors_are_drawn_by_their_size() -> None:
    run = buried("standard")
    x = torch.zeros(BATCH, D)
    x[5] = 3.0
    run.sae.parameters["encoder"][:] = 0.0
    direction = missed_directions(run.sae, x, 1, seed=0)
    torch.testing.assert_close(direction, torch.nn.functional.normalize(x[5:6], dim=-1))
    # Nothing missed at all is no error.
    assert missed_directions(run.sae, torch.zeros(BATCH, D), 3, seed=0).shape == (3, D)


@pytest.mark.parametrize(
    ("every", "done"), [(None, [1, 2, 29, 30]), (2, [2, 4, 28, 30]), (7, [7, 14, 21, 28]), (0, [])]
)
def test_it_happens_in_the_first_three_quarters_of_a_run(every: int | None, done: list[int]) -> None:
    options = settings("gated", resample_every=every).options
    assert hasattr(options, "resamples_after")
    due = [step for step in range(1, STEPS + 1) if options.resamples_after(step, STEPS)]
    assert [*due[:2], *due[-2:]] == done


def test_where_all_features_are_dead_none_begins_anew() -> None:
    run = buried("standard")
    run.sae.parameters["bias"][:] = -50.0
    for x in stream(4):
        run.advance(x)
    assert bool((run.sae.parameters["bias"] < -49).all())


@pytest.mark.slow
def test_processes_that_share_a_run_begin_the_same_features_anew(tmp_path: Path) -> None:
    said = torchrun("-m", "tests.unit.training.replicas", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"], said
    one, two = ((tmp_path / rank).read_text() for rank in "01")
    assert one == two
    assert one.endswith("True")
