"""`steerserve policy`, as a safety team calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from steerserve.access.key_file import change_key_file
from steerserve.access.key_text import new_key_text
from steerserve.errors import ConfigError, PolicyError
from steerserve.policy.command import app
from steerserve.sae import Direction, Hook, write_direction
from tests.support.models import D_MODEL
from tests.support.saes import make_sae

from ..access.conftest import make_entry
from .documents import document


def run(*words: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name an SAE `demo` at layer 2 and a direction `north`."""
    folder = tmp_path_factory.mktemp("served")
    unit = torch.nn.functional.normalize(torch.ones(D_MODEL), dim=0)
    write_direction(folder / "north.safetensors", Direction("north", unit, Hook(2, "resid_post"), {}))
    sae = make_sae(folder / "demo", "jumprelu", 2)
    return ["--sae", f"demo={sae}", "--direction", f"north={folder / 'north.safetensors'}"]


def test_sound_documents_pass(home: Path) -> None:
    done = run("check", home)
    assert done.exit_code == 0, done.output
    assert "1 policies checked as documents, without SAEs: nothing is wrong" in done.output


def test_every_bad_document_is_told(home: Path) -> None:
    (home / "bad.yaml").write_text("{")
    (home / "worse.yaml").write_bytes(document("worse", version=0))
    (home / "no-scam.yml").write_bytes(document())
    (home / "folder.yaml").mkdir()
    done = run("check", home)
    assert done.exit_code == 1
    assert "bad.yaml: expected YAML" in done.output
    assert "worse.yaml: expected `version` >= 1, got 0 - at $.version" in done.output
    assert "no-scam.yml: expected one file for each policy" in done.output
    assert "folder.yaml: expected a file" in done.output


def test_models_and_keys_that_will_not_be_there_are_told(home: Path, tmp_path: Path) -> None:
    limits = {"models": ["demo", "dmeo"], "scopes": ["steer", "key:app", "key:api-key", "key:ap"]}
    (home / "narrow.yaml").write_bytes(document("narrow", applies=limits))
    keys = tmp_path / "keys.yaml"
    change_key_file(keys, lambda known: (*known, make_entry(new_key_text(), "app")), create=True)
    assert run("check", home).exit_code == 0
    done = run("check", home, "--model", "demo", "--keys", keys)
    assert done.exit_code == 1
    assert "policy `narrow`: expected names that are known, got 'key:ap', 'dmeo'" in done.output


def test_features_labels_and_units_are_looked_up_in_what_will_be_served(
    home: Path, served: list[str]
) -> None:
    assert run("check", home, *served).exit_code == 0
    (home / "far.yaml").write_bytes(document("far", interventions=[{"feature": 70_000, "op": "ablate"}]))
    south = [{"direction": "south", "op": "ablate"}]
    (home / "south.yaml").write_bytes(document("south", interventions=south))
    assert run("check", home).exit_code == 0
    done = run("check", home, *served)
    assert done.exit_code == 1
    assert "70000" in done.output
    assert "south" in done.output


def test_a_layer_beyond_the_model_or_another_width_is_the_users_mistake(
    home: Path, served: list[str]
) -> None:
    with pytest.raises(ConfigError, match="expected `layer` < 2"):
        run("check", home, *served, "--layers", "2")
    with pytest.raises(ConfigError, match="expected NAME=PATH, got 'demo'"):
        run("check", home, "--sae", "demo")
    assert run("check", home, *served[2:], "--layers", "3", "--width", str(D_MODEL)).exit_code == 1


def test_a_folder_that_is_not_there_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="No such file"):
        run("check", tmp_path / "nowhere")


def test_show_lists_what_each_policy_does(home: Path) -> None:
    changes = [
        {"direction": "north", "op": "add", "value": 4.0},
        {"sae": "demo", "feature": "scam[s]", "op": "ablate"},
    ]
    watch = [{"name": "flattery", "feature": 3, "above": 1.5}]
    limits = {"scopes": ["infer"], "models": ["demo"]}
    (home / "two.yaml").write_bytes(document("two", interventions=changes, watch=watch, applies=limits))
    shown = run("show", home).output
    assert "two: Ticket 12: never help with scams." in shown
    assert "add direction north 4 raw" in shown
    assert "ablate feature scam[s] of demo" in shown
    assert "watch flattery: feature 3 > 1.5" in shown
    assert "scopes: infer; models: demo" in shown
    assert "everything" in shown


def test_show_refuses_a_folder_with_a_bad_document(home: Path) -> None:
    (home / "bad.yaml").write_text("{")
    with pytest.raises(PolicyError, match=r"bad\.yaml"):
        run("show", home)
