"""What `compat` says of vLLM, against vLLM: the one that is installed, and others whose sources are at hand.

`STEERSERVE_VLLM_SOURCES` names a folder that holds one: `unzip -d FOLDER vllm-0.33.0-*.whl '*.py'`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import vllm

from steerserve_vllm import compat
from tests.support.vllm_sources import Sources

INSTALLED = Path(vllm.__file__).parents[1]
OTHER = [Path(folder) for folder in os.environ.get("STEERSERVE_VLLM_SOURCES", "").split(os.pathsep) if folder]
EVERY_SEAM = compat.SEAMS | compat.V2_SEAMS | compat.FRONT_END_SEAMS | compat.COHERE_SEAMS

# Pydantic's, which vLLM's class has of it: not in vLLM's sources.
INHERITED = ("run_batch_line",)


@pytest.fixture(scope="module", params=[INSTALLED, *OTHER], ids=["installed", *map(str, OTHER)])
def sources(request: pytest.FixtureRequest) -> Sources:
    return Sources(request.param)


def version_of(sources: Sources) -> str:
    text = (sources.root / "vllm" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r"^__version__ = version = ['\"](.+)['\"]", text, re.MULTILINE)
    assert found is not None
    return found[1]


def test_this_version_is_known(sources: Sources) -> None:
    assert compat.series(version_of(sources)) in compat.VERSIONS


def test_every_wrapped_function_has_the_parameters_that_are_relied_on(sources: Sources) -> None:
    version = version_of(sources)
    wrong = {}
    for name, seam in EVERY_SEAM.items():
        if name in INHERITED:
            continue
        function = sources.function(seam.module, seam.name)
        expected = seam.expected(version)
        found = tuple(a.arg for a in function.args.posonlyargs + function.args.args) if function else None
        named = {a.arg for a in function.args.kwonlyargs} | {*(found or ())} if function else set()
        if found is None or found[: len(expected)] != expected or not named.issuperset(seam.keywords):
            wrong[name] = (found, expected, seam.keywords)
    assert wrong == {}


def test_a_parameter_that_only_one_version_has_is_the_last_there(sources: Sources) -> None:
    """`further` says what a version has more, and the wrapper takes no more than that."""
    seam = compat.FRONT_END_SEAMS["run_batch_request"]
    function = sources.function(seam.module, seam.name)
    assert function is not None
    assert tuple(a.arg for a in function.args.args) == seam.expected(version_of(sources))


@pytest.mark.parametrize("table", ["SETTINGS", "ATTRIBUTES", "ONLY"])
def test_everything_that_is_read_is_there(sources: Sources, table: str) -> None:
    known = compat.ONLY[compat.series(version_of(sources))] if table == "ONLY" else getattr(compat, table)
    missing = []
    for owner, names in known.items():
        module, cls = owner.split(":")
        there = sources.members(module, cls) if cls else sources.exports(module)
        missing += [f"{owner}.{name}" for name in names if name not in there]
    assert missing == []


def test_what_is_missing_is_seen(sources: Sources) -> None:
    """The setting that a refusal once read, on an object of the test's own making, and which no vLLM has."""
    assert "enable_sp" not in sources.members("vllm.config.compilation", "PassConfig")
    assert "fuse_allreduce_rms" in sources.members("vllm.config.compilation", "PassConfig")
