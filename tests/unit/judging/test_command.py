"""The commands whole, on the demo's model and SAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from demo.prompts import NEUTRAL_PROMPTS
from steerserve.errors import ConfigError
from steerserve.judging.command import eval_command
from steerserve.judging.directions_command import directions_command
from steerserve.judging.texts import Text
from steerserve.sae import open_sae, read_direction
from steerserve.training.shard_writer import ShardWriter

from .conftest import DEMO
from .pages import Page

MODEL, SAE = str(DEMO / "model"), str(DEMO / "sae")
SMALL = ["--tokens", "1500", "--splice-texts", "8", "--device", "cpu"]
STEERED = ["--steer-tokens", "6", "--steer-features", "1"]

app = typer.Typer()
app.command("eval")(eval_command)
app.command("directions")(directions_command)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, labelled: list[Text]) -> Path:
    """texts.jsonl and prompts.txt."""
    folder = tmp_path_factory.mktemp("material")
    rows = [json.dumps({"text": text, "label": label}) for text, label in labelled]
    (folder / "texts.jsonl").write_text("\n".join(rows))
    (folder / "prompts.txt").write_text("\n".join(NEUTRAL_PROMPTS[:4]))
    return folder


@pytest.fixture(scope="module")
def reported(files: Path) -> dict[str, Any]:
    out = files / "report"
    given = ["--texts", files / "texts.jsonl", "--prompts", files / "prompts.txt", "--out", out]
    run("eval", MODEL, "--sae", SAE, "--sae", f"again={SAE}", *given, *SMALL, *STEERED)
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_the_demo_is_judged_from_reconstruction_to_steering(reported: dict[str, Any]) -> None:
    first, again = reported["saes"]
    assert (first["name"], again["name"]) == ("sae", "again")
    assert first["reconstruction"] == again["reconstruction"]
    assert 0.7 < first["reconstruction"]["explained_variance"] < first["reconstruction"]["r2"] < 1
    assert 0.9 < first["model_loss"]["ce_score"] < 1
    assert 0.9 < first["model_loss"]["kl_score"] < 1
    assert [row["label"] for row in first["labelled"]["concepts"]] == ["code", "food", "legal", "music"]
    assert all(0.2 < row["latent"]["f1"] < row["probe"]["f1"] for row in first["labelled"]["concepts"])
    assert first["labelled"]["tpp"]["20"]["score"] > 0.2
    controls = {"unsteered", "prompt", "random feature", "wrong sign", "diffmean", "probe"}
    assert set(first["steering"]["methods"]) == {"sae", *controls}
    assert first["steering"] == again["steering"]
    assert reported["text_classifier_accuracy"] > 0.8


def test_the_page_stands_by_itself(reported: dict[str, Any], files: Path) -> None:
    page = Page((files / "report" / "report.html").read_text())
    assert page.fetched == []
    assert page.open == []
    assert f"{reported['saes'][0]['model_loss']['ce_score']:.3f}" in page.text


def test_shards_alone_need_no_model(tmp_path: Path) -> None:
    sae = open_sae(DEMO / "sae")
    assert sae.hook is not None
    x = torch.randn(300, sae.d_in, generator=torch.Generator().manual_seed(0))
    column = torch.arange(300)
    with ShardWriter(tmp_path / "shards", sae.d_in, sae.hook, "none", dtype="float32") as writer:
        writer.append(x, column, column, column)
    save_file({"features": torch.eye(sae.d_in)}, tmp_path / "known.safetensors")
    given = ["--shards", tmp_path / "shards", "--known", tmp_path / "known.safetensors", "--out"]
    run("eval", "no/model", "--sae", SAE, *given, tmp_path / "out", *SMALL)
    (found,) = json.loads((tmp_path / "out" / "report.json").read_text())["saes"]
    error = (x - sae.decode(sae.encode(x))).square().sum()
    assert found["reconstruction"]["r2"] == pytest.approx(1 - float(error / x.square().sum()), rel=1e-4)
    assert found["known_features"]["mcc"] > 0
    assert found["model_loss"] is None


@pytest.mark.parametrize("method", ["diffmean", "probe"])
def test_directions_are_written_for_the_server(method: str, files: Path, tmp_path: Path) -> None:
    given = ["--texts", files / "texts.jsonl", "--layer", 3, "--method", method, "--out", tmp_path / "made"]
    out = run("directions", MODEL, *given, "--label", "food", "--label", "code", "--device", "cpu")
    assert "food" in out
    assert "2 safetensors files" in out
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "code.safetensors",
        "directions.json",
        "food.safetensors",
    ]
    found = read_direction(tmp_path / "made" / "food.safetensors")
    assert found.hook is not None
    assert found.hook.name == "blocks.3.hook_resid_post"
    assert found.statistics["auroc_texts"] > 0.9
    assert found.statistics["max_activation"] > found.statistics["mean_inside"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sae", SAE, "--texts", "none.jsonl"], "expected a JSONL file of texts"),
        (["--sae", "no/sae", "--texts", "TEXTS"], "expected an SAE's folder or weights file"),
        (["--sae", SAE], "expected texts or activation shards"),
        (["--sae", SAE, "--texts", "TEXTS", "--held-out", "1.5"], "expected --held-out: .* got 1.5"),
        (
            ["--sae", SAE, "--texts", "PLAIN", "--prompts", "PROMPTS"],
            "expected labelled texts to judge steering",
        ),
        (["--sae", SAE, "--texts", "MIXED"], "expected a label on all 2 texts or on none, got 1"),
        (["--sae", SAE, "--texts", "SINGLE"], "at least two texts of each label, got one of 'a'"),
        (["--sae", "NARROW", "--texts", "PLAIN"], "expected an SAE of the model's width 256, narrow has 64"),
        (["--sae", "HOOKLESS", "--texts", "PLAIN"], "expected --layer and --hook"),
        (["--sae", "HOOKLESS", "--texts", "PLAIN", "--layer", "9"], "expected a layer < 6"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    arguments: list[str], message: str, files: Path, tmp_path: Path, folders: dict[str, Path]
) -> None:
    plain, mixed, single = ({"text": "one"}, {"text": "two", "label": "a"}, {"text": "three", "label": "b"})
    for name, rows in (("plain", [plain]), ("mixed", [plain, mixed]), ("single", [mixed, single])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    places = {name.upper(): str(tmp_path / f"{name}.jsonl") for name in ("plain", "mixed", "single")}
    places |= {"TEXTS": str(files / "texts.jsonl"), "PROMPTS": str(files / "prompts.txt")}
    places |= {"NARROW": f"narrow={folders['standard']}", "HOOKLESS": str(_hookless(tmp_path / "hookless"))}
    with pytest.raises(ConfigError, match=message):
        run("eval", MODEL, *(places.get(item, item) for item in arguments), "--out", tmp_path / "out", *SMALL)
    assert not (tmp_path / "out").exists()


def test_a_report_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        run("eval", MODEL, "--sae", SAE, "--out", tmp_path)


def test_directions_of_a_label_that_is_not_there_are_refused(files: Path, tmp_path: Path) -> None:
    given = ["--texts", files / "texts.jsonl", "--layer", 3, "--out", tmp_path / "made", "--device", "cpu"]
    with pytest.raises(ConfigError, match=r"expected --label among .*, got \['love'\]"):
        run("directions", MODEL, *given, "--label", "love")
    with pytest.raises(ConfigError, match="--method diffmean or probe, got 'pca'"):
        run("directions", MODEL, *given, "--method", "pca")


def _hookless(folder: Path) -> Path:
    """The demo's SAE without the name of its hook."""
    folder.mkdir()
    config = json.loads((DEMO / "sae" / "cfg.json").read_text())
    config["metadata"].pop("hook_name")
    (folder / "cfg.json").write_text(json.dumps(config))
    (folder / "sae_weights.safetensors").write_bytes((DEMO / "sae" / "sae_weights.safetensors").read_bytes())
    return folder
