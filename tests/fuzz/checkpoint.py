"""Fuzz target: an SAE on disk opens, or a CheckpointError says why it does not."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from steerserve.errors import CheckpointError
from steerserve.sae import open_sae
from tests.fuzz.fuzzing import run
from tests.fuzz.strategies import mutated
from tests.unit.sae.layouts import LAYOUTS

NAMES = sorted(LAYOUTS)


@cache
def written(name: str) -> tuple[Path, tuple[tuple[Path, bytes], ...]]:
    """An SAE of this layout, and the files that may be damaged."""
    found = LAYOUTS[name](Path(tempfile.mkdtemp()))
    files = (
        [found.path]
        if found.path.is_file()
        else sorted(path for path in found.path.rglob("*") if path.is_file())
    )
    return found.path, tuple((path, path.read_bytes()) for path in files)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, Path, bytes]:
    """A layout, one of its files, and what it holds instead."""
    name = draw(st.sampled_from(NAMES))
    file, content = draw(st.sampled_from(written(name)[1]))
    # Headers and directories of archives stand at the ends.
    head, tail = content[:600], content[-900:]
    if draw(st.booleans()):
        return name, file, draw(mutated(head)) + content[len(head) :]
    return name, file, content[: -len(tail)] + draw(mutated(tail))


def holds(case: Any) -> None:
    """Whatever one file of it holds."""
    name, file, content = case
    path, files = written(name)
    try:
        file.write_bytes(content)
        open_sae(path).rows([0])
    except CheckpointError as error:
        _names_the_file(error, path)
    finally:
        file.write_bytes(dict(files)[file])


def _names_the_file(error: CheckpointError, path: Path) -> None:
    assert str(path.parent) in str(error), error


if __name__ == "__main__":
    run(damaged(), holds)
