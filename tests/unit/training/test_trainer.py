from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from steerserve.errors import ConfigError
from steerserve.sae.architectures import ARCHITECTURES
from steerserve.training.initial import geometric_median, input_scale
from steerserve.training.settings import TrainSettings, parse_settings
from steerserve.training.trainer import Progress, Trained, train, train_several

from .conftest import Harvest

FEATURES, D, ACTIVE = 48, 32, 3


def planted(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` sums of three of 48 unit directions, off centre, in an arbitrary scale; and the directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(FEATURES, D, generator=generator), dim=-1)
    chosen = torch.rand(count, FEATURES, generator=generator).topk(ACTIVE).indices
    strength = torch.zeros(count, FEATURES)
    strength.scatter_(1, chosen, 1 + torch.rand(count, ACTIVE, generator=generator))
    noise = 0.02 * torch.randn(count, D, generator=generator)
    return 7 * (strength @ directions + noise) + torch.randn(D, generator=generator), directions


def settings(**changes: object) -> TrainSettings:
    small = {"d_sae": FEATURES, "k": ACTIVE, "batch_size": 500, "held_out": 1000, "lr": 3e-3, "warm_up": 20}
    return parse_settings({**small, "tokens": 200_000, **changes})


def of(name: str, **changes: object) -> TrainSettings:
    """The small settings of another architecture."""
    small = settings(**changes).flat()
    kind = ARCHITECTURES[name].Options.model_fields
    shared = {key: value for key, value in small.items() if key in kind or key in TrainSettings.model_fields}
    return parse_settings({**shared, "architecture": name})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_planted_dictionary_is_recovered(precision: str, harvest: Harvest) -> None:
    x, directions = planted(21_000)
    trained = train(harvest(x), settings(precision=precision))
    cosines = directions @ trained.sae.parameters["decoder"].T
    assert cosines.amax(dim=1).mean() > 0.95
    assert cosines.amax(dim=0).median() > 0.95


def test_the_decoder_stays_on_the_unit_sphere_and_the_threshold_is_learned(harvest: Harvest) -> None:
    trained = train(harvest(planted(5000)[0]), settings(tokens=20_000))
    norms = trained.sae.parameters["decoder"].norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(FEATURES))
    assert trained.sae.buffers["threshold"] > 0


def _same(one: Trained, other: Trained) -> bool:
    mine, theirs = ({**t.sae.parameters, **t.sae.buffers} for t in (one, other))
    same = all(torch.equal(mine[name], theirs[name]) for name in mine | theirs)
    return one.scale == other.scale and same


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_an_interrupted_run_ends_as_it_would_have(name: str, harvest: Harvest, tmp_path: Path) -> None:
    reader = harvest(planted(5000)[0])
    wanted = of(name, tokens=30_000, checkpoint_every=7, dead_after=1000)
    whole = train(reader, wanted)
    checkpoint = tmp_path / "run.safetensors"
    for moment in (20, 40):

        def kill(progress: Progress, moment: int = moment) -> None:
            if progress.done == moment:
                raise _KilledError

        with pytest.raises(_KilledError):
            train(reader, wanted, checkpoint=checkpoint, report=kill)
    assert _same(train(reader, wanted, checkpoint=checkpoint), whole)


def test_a_checkpoint_of_other_settings_is_refused(harvest: Harvest, tmp_path: Path) -> None:
    reader, checkpoint = harvest(planted(5000)[0]), tmp_path / "run.safetensors"
    train(reader, settings(tokens=5000, checkpoint_every=5), checkpoint=checkpoint)
    with pytest.raises(ConfigError, match="other settings"):
        train(reader, settings(tokens=5000, checkpoint_every=5, seed=1), checkpoint=checkpoint)


def test_progress_is_reported_to_the_last_step(harvest: Harvest) -> None:
    seen: list[Progress] = []
    train(harvest(planted(5000)[0]), settings(tokens=12_500), report=seen.append)
    assert [progress.done for progress in seen] == [10, 20, 25]
    assert all(progress.l0 == pytest.approx(ACTIVE, abs=0.01) for progress in seen)
    assert seen[-1].loss < seen[0].loss
    assert seen[-1].explained_variance <= 1


def test_features_that_never_fire_count_as_dead(harvest: Harvest) -> None:
    seen: list[Progress] = []
    wanted = settings(d_sae=400, tokens=20_000, dead_after=6000)
    train(harvest(planted(5000)[0]), wanted, report=seen.append)
    assert seen[0].dead_share == 0 < seen[-1].dead_share


def test_too_few_rows_are_refused_with_the_number_wanted(harvest: Harvest) -> None:
    with pytest.raises(ConfigError, match="at least 1500 harvested tokens"):
        train(harvest(planted(1200)[0]), settings())


def test_a_diverging_run_is_stopped(harvest: Harvest) -> None:
    with pytest.raises(ConfigError, match="lower `lr`"):
        train(harvest(planted(5000)[0]), settings(lr=1e30))


@pytest.mark.parametrize(
    "change", [{"k": 0}, {"k": 2.5}, {"lr": -1.0}, {"lr": float("nan")}, {"surprise": 1}, {"seed": True}]
)
def test_a_wrong_setting_is_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"`{next(iter(change))}`"):
        settings(**change)


def test_the_learning_rate_warms_up_stays_and_decays() -> None:
    wanted = settings(tokens=500 * 1000, lr=1.0, warm_up=10)
    rates = [wanted.lr_at(step) for step in range(1000)]
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert set(rates[10:800]) == {1.0}
    assert all(a > b for a, b in itertools.pairwise(rates[800:]))
    assert rates[-1] > 0


def test_the_geometric_median_ignores_outliers() -> None:
    x = torch.cat([torch.randn(999, 4, generator=torch.Generator().manual_seed(0)), torch.full((1, 4), 1e6)])
    assert geometric_median(x).norm() < 0.2
    assert x.mean(0).norm() > 1000


def test_the_scale_makes_the_mean_square_distance_one() -> None:
    x = 5 * torch.randn(4000, 8) + 3
    scale = input_scale(x, x.mean(0))
    assert float(((x - x.mean(0)) * scale).square().sum(-1).mean()) == pytest.approx(1, rel=1e-4)


def test_saes_of_one_stream_are_what_each_would_be_alone(harvest: Harvest) -> None:
    reader = harvest(planted(5000)[0])
    wanted = [of("topk", tokens=10_000), of("jumprelu", tokens=10_000, seed=0)]
    seen: list[int] = []
    together = train_several(reader, wanted, report=lambda number, _: seen.append(number))
    assert all(_same(a, train(reader, b)) for a, b in zip(together, wanted, strict=True))
    assert seen == [0, 1] * 2


def test_saes_of_one_stream_must_agree_about_the_data(harvest: Harvest) -> None:
    wanted = [settings(), settings(batch_size=250)]
    with pytest.raises(ConfigError, match="one `batch_size`"):
        train_several(harvest(planted(5000)[0]), wanted)


def test_an_option_of_another_architecture_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no `k` for architecture standard"):
        parse_settings({"architecture": "standard", "k": 3})


def test_an_unknown_architecture_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="batchtopk, gated"):
        parse_settings({"architecture": "crosscoder"})
