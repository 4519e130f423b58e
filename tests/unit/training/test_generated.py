from __future__ import annotations

import itertools

import pytest
import torch

from steerserve.errors import ConfigError
from steerserve.training.generated import train_on
from steerserve.training.run import Progress
from steerserve.training.settings import TrainSettings, parse_settings


def settings(**values: object) -> TrainSettings:
    common = {"architecture": "topk", "d_sae": 12, "k": 2, "batch_size": 32, "tokens": 640, "device": "cpu"}
    return parse_settings({**common, **values})


def batches(count: int, scale: float = 1.0) -> list[torch.Tensor]:
    return list(scale * torch.randn(count, 32, 6, generator=torch.Generator().manual_seed(0)))


def test_several_are_trained_on_one_stream_as_each_alone() -> None:
    both = train_on(iter(batches(20)), [settings(), settings(k=3)])
    for one, k in zip(both, (2, 3), strict=True):
        alone = train_on(batches(20), [settings(k=k)])[0]
        for name, tensor in alone.sae.parameters.items():
            assert torch.equal(tensor, one.sae.parameters[name])


def test_the_datas_scale_does_not_matter() -> None:
    one, large = (train_on(batches(20, scale), [settings()])[0] for scale in (1.0, 1000.0))
    assert large.scale == pytest.approx(one.scale / 1000, rel=1e-5)
    torch.testing.assert_close(
        large.sae.parameters["decoder"], one.sae.parameters["decoder"], rtol=0, atol=1e-4
    )


def test_an_endless_stream_is_read_for_as_many_steps_as_were_asked_for() -> None:
    seen: list[tuple[int, Progress]] = []
    source = itertools.cycle(batches(3))
    train_on(source, [settings()], lambda number, progress: seen.append((number, progress)))
    assert [progress.done for _, progress in seen] == [10, 20]


@pytest.mark.parametrize("count", [0, 7])
def test_a_stream_that_ends_too_soon_is_named(count: int) -> None:
    with pytest.raises(ConfigError, match=f"expected 20 batches to train on, got {count or 'none'}"):
        train_on(batches(count), [settings()])


def test_settings_of_different_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="make 20 steps each"):
        train_on(batches(20), [settings(), settings(tokens=320)])
