"""`steerserve sae inspect` and `verify`, as an operator calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from steerserve.cli import app
from steerserve.errors import CheckpointError
from tests.support.saes import make_sae

from .layouts import LAYOUTS, sparsify

WEIGHTS = "sae_weights.safetensors"


def test_inspect_says_how_an_sae_can_be_served(tmp_path: Path) -> None:
    plain, top = make_sae(tmp_path / "plain", "jumprelu", 2), make_sae(tmp_path / "top", "topk", 1)
    done = CliRunner().invoke(app, ["sae", "inspect", str(plain), "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.output)
    assert (facts["architecture"], facts["hook"]) == ("jumprelu", "blocks.2.hook_resid_post")
    assert facts["served"] == "feature by feature"
    told = CliRunner().invoke(app, ["sae", "inspect", str(top)]).output
    assert "only with --resident" in told
    assert "exact top-k" in told


@pytest.mark.parametrize("name", LAYOUTS)
def test_inspect_and_verify_read_every_layout(name: str, tmp_path: Path) -> None:
    path = str(LAYOUTS[name](tmp_path).path)
    shown = CliRunner().invoke(app, ["sae", "inspect", path, "--json"])
    assert json.loads(shown.output)["layout"] == name
    assert json.loads(shown.output)["hook"] == "blocks.3.hook_resid_post"
    sound = CliRunner().invoke(app, ["sae", "verify", path])
    assert sound.exit_code == 0, sound.output


def test_inspect_says_why_an_sae_is_not_served(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["sae", "inspect", str(sparsify(tmp_path, transcode=True).path), "--json"])
    assert json.loads(told.output)["served"].startswith("not at all: it is a transcoder")


def test_verify_reads_every_weight_and_names_the_tensor_that_is_not_finite(tmp_path: Path) -> None:
    folder = make_sae(tmp_path / "sae", "standard", 1)
    sound = CliRunner().invoke(app, ["sae", "verify", str(folder)])
    assert sound.exit_code == 0, sound.output
    assert "every weight finite; no manifest" in sound.output
    tensors = load_file(folder / WEIGHTS)
    tensors["W_dec"][3, 4] = torch.nan
    save_file(tensors, folder / WEIGHTS)
    damaged = CliRunner().invoke(app, ["sae", "verify", str(folder)])
    assert isinstance(damaged.exception, CheckpointError)
    assert "W_dec" in str(damaged.exception)
