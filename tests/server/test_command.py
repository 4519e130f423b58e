"""`steerserve serve` is `vllm serve`: its command line is understood by vLLM as it is installed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from steerserve.cli import serve_command
from steerserve.errors import ConfigError

DEMO = Path(__file__).parents[2] / "sae_weights" / "demo"
OURS = {"saes": [{"name": "demo", "path": str(DEMO / "sae")}], "directions": []}


@pytest.fixture(autouse=True)
def _log_on_failure() -> None:
    """Instead of the folder's fixture of this name, which would start the folder's server too."""


def test_vllm_lists_its_own_flags_behind_our_command() -> None:
    command, environment = serve_command("m", OURS, ["--help=listgroup"])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--help" in done.stdout


def test_an_additional_config_of_the_users_is_merged_with_ours() -> None:
    given = {"other": {"a": 1}, "steerserve": {"max_interventions": 3}}
    command, environment = serve_command("m", OURS, ["--port", "1", "--additional-config", json.dumps(given)])
    assert command[0] == sys.executable
    assert command[-2:] == ["--port", "1"]
    config = json.loads(command[command.index("--additional-config") + 1])
    assert config["other"] == {"a": 1}
    assert config["steerserve"] == {"max_interventions": 3, "saes": OURS["saes"]}
    assert "steerserve" in environment["VLLM_PLUGINS"].split(",")


@pytest.mark.parametrize("bad", ["{", "[]"])
def test_an_additional_config_that_is_no_object_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match="JSON"):
        serve_command("m", OURS, [f"--additional-config={bad}"])
