"""`steerserve serve` is `vllm serve`: its command line is understood by vLLM as it is installed here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from steerserve.cli import serve_command
from steerserve.errors import ConfigError, KeyFileError, PolicyError
from tests.support import fork_server

DEMO = Path(__file__).parents[2] / "sae_weights" / "demo"
LOCAL = ["--host", "127.0.0.1"]
OURS = {"saes": [{"name": "demo", "path": str(DEMO / "sae")}], "directions": []}


@pytest.fixture(autouse=True)
def _log_on_failure() -> None:
    """Instead of the folder's fixture of this name, which would start the folder's server too."""


def test_vllm_lists_its_own_flags_behind_our_command(tmp_path: Path) -> None:
    command, environment = serve_command("m", OURS, ["--help=listgroup"])
    done = fork_server.run(*command[1:], env=environment, folder=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--help" in done.stdout


def test_an_additional_config_of_the_users_is_merged_with_ours() -> None:
    given = {"other": {"a": 1}, "steerserve": {"max_interventions": 3}}
    command, environment = serve_command("m", OURS, [*LOCAL, "--additional-config", json.dumps(given)])
    assert command[0] == sys.executable
    assert command[-2:] == LOCAL
    config = json.loads(command[command.index("--additional-config") + 1])
    assert config["other"] == {"a": 1}
    assert config["steerserve"] == {"max_interventions": 3, "saes": OURS["saes"]}
    assert "steerserve" in environment["VLLM_PLUGINS"].split(",")


@pytest.mark.parametrize("bad", ["{", "[]"])
def test_an_additional_config_that_is_no_object_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match="JSON"):
        serve_command("m", OURS, [f"--additional-config={bad}"])


def test_an_open_server_is_refused_where_others_could_reach_it() -> None:
    for rest in ([], ["--host", "0.0.0.0"], ["--host=::"]):
        with pytest.raises(ConfigError, match="expected keys, or a loopback host"):
            serve_command("m", OURS, rest)
    serve_command("m", {**OURS, "open_to_all": True}, ["--host", "0.0.0.0"])
    serve_command("m", OURS, ["--host", "0.0.0.0", "--api-key", "secret"])


def test_policies_and_keys_are_read_before_vllm_starts(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("name: p\nversion: one\n", encoding="utf-8")
    with pytest.raises(PolicyError, match=r"p\.yaml"):
        serve_command("m", {**OURS, "policies": str(tmp_path)}, LOCAL)
    with pytest.raises(KeyFileError, match="keys"):
        serve_command("m", {**OURS, "keys": str(tmp_path / "keys.yaml")}, LOCAL)
