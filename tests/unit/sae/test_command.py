"""`steerserve sae inspect` and `verify`, as an operator calls them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from steerserve.cli import app
from steerserve.errors import CheckpointError
from tests.support.saes import make_sae

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
