"""vLLM's own classes of every model family that the README names: their layers are found and hooked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support import fork_server
from tests.support.families import FAMILIES, N_LAYERS


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("families")
    done = fork_server.run("-m", "tests.support.families", str(folder), folder=folder, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "cohere"])
def test_the_layers_of_a_family_are_found_by_structure(hooked: dict[str, Any], family: str) -> None:
    assert hooked[family] == list(range(N_LAYERS + 1))


def test_a_family_whose_layers_return_something_else_than_two_summands_is_refused(
    hooked: dict[str, Any],
) -> None:
    """Cohere's second output is the stream before the layer; adding it would double what was there."""
    assert "add" in hooked["cohere"]
