from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from rich.console import Console
from typer.testing import CliRunner

from steerserve.errors import CheckpointError, ConfigError
from steerserve.sae import Hook, open_sae
from steerserve.sae.architectures import ARCHITECTURES
from steerserve.training.command import train, train_folder, train_folders
from steerserve.training.config import TrainConfig
from steerserve.training.settings import TrainSettings
from steerserve.training.shards import ShardReader
from steerserve.training.state import done_steps

from .conftest import Harvest
from .processes import torchrun
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
    fields = [item for item in TrainSettings.model_fields.items() if item[0] != "options"]
    for kind in ARCHITECTURES.values():
        fields += kind.Options.model_fields.items()
    for name, info in fields:
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


def _config(path: Path, shards: Path, **changes: object) -> Path:
    """A YAML file of the small settings, which trains into `saes` beside it."""
    small = {"d_sae": 48, "batch_size": 500, "held_out": 1000, "tokens": 20_000, "lr": 0.003}
    values = {"shards": str(shards), "out": str(path.parent / "saes"), **small, **changes}
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_config_trains_several_saes_on_one_stream(harvest: Harvest, tmp_path: Path) -> None:
    saes = [{"name": "a", "architecture": "topk", "k": 3}, {"name": "b", "architecture": "gated"}]
    config = _config(tmp_path / "run.yaml", harvest(planted(5000)[0]).folder, saes=saes)
    board = tmp_path / "board"
    result = CliRunner().invoke(_app(), [str(config), "--d-sae", "40", "--tensorboard", str(board)])
    assert result.exit_code == 0, result.output
    found = {name: open_sae(tmp_path / "saes" / name) for name in ("a", "b")}
    assert {name: (sae.architecture, sae.d_sae) for name, sae in found.items()} == {
        "a": ("topk", 40),
        "b": ("gated", 40),
    }
    for name in found:
        lines = (tmp_path / "saes" / name / "training.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [10, 20, 30, 40]
        assert {json.loads(line)["sae"] for line in lines} == {name}
        assert list((board / name).glob("events.*"))
    assert sorted(path.name for path in (tmp_path / "saes").iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arcitecture": "topk"}, "arcitecture"),
        ({"saes": [{"architecture": "topk"}]}, "`name`"),
        ({"saes": [{"name": "a"}, {"name": "a"}]}, "twice"),
        ({"saes": [{"name": "../a"}]}, "`name`"),
        ({"saes": {}}, "list"),
        ({"architecture": "standard", "k": 3}, "no `k` for architecture standard"),
    ],
)
def test_a_wrong_config_is_refused_by_name(
    changes: dict[str, object], message: str, harvest: Harvest, tmp_path: Path
) -> None:
    config = _config(tmp_path / "run.yaml", harvest(planted(2000)[0]).folder, **changes)
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(_app(), [str(config)], catch_exceptions=False)
    assert not (tmp_path / "saes").exists()


def test_a_config_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="valid YAML"):
        CliRunner().invoke(_app(), [str(tmp_path / "run.yaml")], catch_exceptions=False)


def _process(config: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "steerserve", "train", str(config), *words]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "sae_weights.safetensors")


@pytest.mark.slow
def test_a_run_killed_at_a_random_step_ends_as_one_that_never_was(harvest: Harvest, tmp_path: Path) -> None:
    settings = {
        "tokens": 60_000,
        "checkpoint_every": 7,
        "architecture": "batchtopk",
        "k": 3,
        "dead_after": 2000,
    }
    config = _config(tmp_path / "run.yaml", harvest(planted(5000)[0]).folder, **settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(_process(config, str(tmp_path / "whole")), check=True, env=environment)
    log, moment = tmp_path / "saes.training.jsonl", random.randrange(1, 10)
    running = subprocess.Popen(_process(config), env=environment)
    while running.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < moment):
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "saes").exists()
    subprocess.run(_process(config), check=True, env=environment)
    whole, resumed = _weights(tmp_path / "whole"), _weights(tmp_path / "saes")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    record = tmp_path / "saes" / "training.jsonl"
    steps = [json.loads(line)["step"] for line in record.read_text().splitlines()]
    assert steps == list(range(10, 121, 10))


@pytest.mark.slow
def test_two_processes_train_what_one_would(harvest: Harvest, tmp_path: Path) -> None:
    settings = {"tokens": 10_000, "architecture": "topk", "k": 3, "lr": 1e-3}
    config = _config(tmp_path / "run.yaml", harvest(planted(5000)[0]).folder, **settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(_process(config, str(tmp_path / "one")), check=True, env=environment)
    said = torchrun(*_process(config, str(tmp_path / "two"))[1:])
    assert (tmp_path / "two").exists(), said
    one, two = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-3, rtol=2e-3)


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(
    harvest: Harvest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import steerserve.sae.files as files

    real, calls = files.save_file, []

    def full(*args: object, **kwargs: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            Path(str(args[1])).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "save_file", full)
    wanted = settings(tokens=20_000, checkpoint_every=10)
    with pytest.raises(CheckpointError, match="No space left"):
        train_folder(harvest(planted(5000)[0]).folder, tmp_path / "sae", wanted, Console(quiet=True))
    monkeypatch.undo()
    assert done_steps(tmp_path / "sae.checkpoint.safetensors") == 10
    assert sorted(path.name for path in tmp_path.glob("*sae*")) == [
        "sae.checkpoint.safetensors",
        "sae.training.jsonl",
    ]
    train_folder(tmp_path / "shards", tmp_path / "sae", wanted, Console(quiet=True))
    assert open_sae(tmp_path / "sae").d_sae == FEATURES


def test_of_several_saes_none_appears_before_all_are_whole(
    harvest: Harvest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import steerserve.training.command as command

    real, seen = command.save_trained, []

    def fail_on_the_second(folder: Path, *rest: Any) -> Any:
        seen.append(folder)
        if len(seen) == 2:
            raise OSError(28, "No space left on device")
        return real(folder, *rest)

    monkeypatch.setattr(command, "save_trained", fail_on_the_second)
    wanted = settings(tokens=5000, checkpoint_every=5)
    saes = {tmp_path / "saes" / name: wanted for name in ("a", "b")}
    config = TrainConfig(harvest(planted(3000)[0]).folder, saes)
    with pytest.raises(OSError, match="No space"):
        train_folders(config, Console(quiet=True))
    assert not any(out.exists() for out in saes)
    monkeypatch.undo()
    train_folders(config, Console(quiet=True))
    assert all(open_sae(out).d_sae == FEATURES for out in saes)
