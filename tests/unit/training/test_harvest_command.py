from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from steerserve.cli import app
from steerserve.config import HarvestConfig

Words = list[str]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Words]:
    """`started(arguments)` → the command line of the process that would be in our place."""
    found: list[Words] = []

    def replace(_: str, command: Words, environment: dict[str, str]) -> None:
        assert "steerserve" in environment["VLLM_PLUGINS"].split(",")
        found.append(command)

    monkeypatch.setattr(os, "execvpe", replace)

    def start(*arguments: str) -> Words:
        done = CliRunner().invoke(app, ["harvest", *arguments])
        assert done.exit_code == 0, done.output
        return found.pop()

    return start


def test_every_layer_and_what_is_not_ours_goes_to_the_engine_side(started: Callable[..., Words]) -> None:
    command = started(
        "m", "c.jsonl", "out", "--layer", "3", "--layer", "7", "--field", "body", "--dtype", "x"
    )
    assert command[1:6] == ["-m", "steerserve_vllm.harvest_command", "m", "c.jsonl", "out"]
    pairs = list(zip(command[6::2], command[7::2], strict=True))
    assert pairs == [
        ("--layer", "3"),
        ("--layer", "7"),
        ("--hook", "resid_post"),
        ("--field", "body"),
        ("--rows-per-shard", "65536"),
        ("--dtype", "x"),
    ]


@pytest.mark.parametrize("arguments", [["m", "c", "o"], ["m", "c", "o", "--layer", "-1"], ["m", "c"]])
def test_a_command_without_a_sensible_layer_or_place_is_refused(arguments: Words) -> None:
    assert CliRunner().invoke(app, ["harvest", *arguments]).exit_code == 2


def test_the_help_says_what_is_read_and_what_a_kill_costs() -> None:
    shown = CliRunner().invoke(app, ["harvest", "--help"], env={"COLUMNS": "200"}).output
    for word in ("--layer", "--hook", "--field", "--rows-per-shard", ".parquet", "save_to_disk", "killed"):
        assert word in shown


def test_one_layer_is_flat_and_several_get_a_folder_each() -> None:
    one = HarvestConfig.model_validate({"layer": 3, "out": "a"})
    assert {layer: str(path) for layer, path in one.folders.items()} == {3: "a"}
    two = HarvestConfig.model_validate({"layer": [3, 7], "hook": "resid_pre", "out": "a"})
    found = {layer: str(path) for layer, path in two.folders.items()}
    assert found == {3: "a/resid_pre.3", 7: "a/resid_pre.7"}


@pytest.mark.parametrize("layer", [[], [3, 3], -1, [1, -1], "three"])
def test_layers_are_different_ones_that_can_be(layer: object) -> None:
    with pytest.raises(ValueError, match="layer"):
        HarvestConfig.model_validate({"layer": layer, "out": "a"})
