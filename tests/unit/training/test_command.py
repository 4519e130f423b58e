from __future__ import annotations

from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from steerserve.errors import ConfigError
from steerserve.sae import Hook, open_sae
from steerserve.training.command import train, train_folder
from steerserve.training.settings import TrainSettings
from steerserve.training.shards import ShardReader

from .conftest import Harvest
from .test_trainer import FEATURES, D, planted, settings


def test_a_trained_folder_is_served_with_its_record(harvest: Harvest, tmp_path: Path) -> None:
    x = planted(21_000)[0]
    reader, out = harvest(x), tmp_path / "deep" / "sae"
    found = train_folder(reader.folder, out, settings(tokens=100_000), Console(quiet=True))
    sae = open_sae(out)
    assert (sae.architecture, sae.d_in, sae.d_sae) == ("batchtopk", D, FEATURES)
    assert sae.hook == Hook(3, "resid_post")
    assert sae.manifest is not None
    assert sae.manifest.training["explained_variance"] == found.explained_variance
    assert sae.manifest.finite
    f = sae.encode(x[-1000:])
    assert sae.max_activation(5) == pytest.approx(float(f[:, 5].max()), rel=1e-5)
    assert sae.firing_rate(5) == pytest.approx(float((f[:, 5] > 0).float().mean()), abs=1e-6)
    assert found.tokens == 1000
    assert found.explained_variance > 0.9
    assert found.l0 == pytest.approx(3, abs=0.6)
    assert [path.name for path in out.parent.iterdir()] == ["sae"]
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in out.iterdir())


def test_an_existing_folder_is_not_written_over(harvest: Harvest, tmp_path: Path) -> None:
    reader = harvest(planted(2000)[0])
    with pytest.raises(ConfigError, match="exists"):
        train_folder(reader.folder, tmp_path, settings(), Console(quiet=True))


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command("train")(train)
    return app


def test_every_setting_is_an_option_with_its_own_sentence_as_help() -> None:
    result = CliRunner().invoke(_app(), ["--help"], env={"COLUMNS": "300", "TERM": "dumb"})
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    for name, info in TrainSettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert str(info.description) in text


def test_the_command_trains_and_says_what_came_out(harvest: Harvest, tmp_path: Path) -> None:
    folder = harvest(planted(5000)[0]).folder
    options = {"d-sae": 48, "k": 3, "batch-size": 500, "held-out": 1000, "tokens": 20_000, "lr": 0.003}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    result = CliRunner().invoke(_app(), [str(folder), str(tmp_path / "sae"), *words])
    assert result.exit_code == 0, result.output
    assert "explained variance" in " ".join(result.output.split())
    assert ShardReader(folder).d_in == open_sae(tmp_path / "sae").d_in
