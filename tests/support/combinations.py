"""Which of vLLM's features are tested beside steering, on which runner: marks on tests, and their table.

`python -m tests.support.combinations` writes the table to docs/combinations.md from the marks; a test fails
when the two differ.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

__all__ = ["PAGE", "RUNNERS", "V1", "V2", "both_runners", "collect", "combination", "page"]

PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"
_HEAD = """# What works beside steering

Written by `python -m tests.support.combinations` from the marks on the tests under `tests/engine`. *Works*: a
test holds the served log-probabilities to HF transformers with hooks and SAELens (or, for abort and the like,
holds what the row names). *Refused*: a test sees the engine refuse to start with this reason. The V2 runner's
tests run on the CPU, eagerly, with vLLM's kernels and ours in Triton's interpreter; no GPU was at hand.

"""
RUNNERS = ("v1", "v2")
# The engines that most files share. What Triton's interpreter runs cannot be compiled.
V1: dict[str, Any] = {"family": "llama", "enforce_eager": False}
V2: dict[str, Any] = {"family": "llama", "runner": "v2"}


def combination(*features: str, refused: str | None = None) -> Any:
    """Mark a test: it holds these features to work beside steering, or to be refused with a reason."""
    return pytest.mark.combination(*features, refused=refused)


def both_runners(
    options: dict[str, Any] | None = None, name: str = "", *, slow_v2: bool = False, **v2: Any
) -> Any:
    """Parametrise `engine` by the model runner.

    Args:
        options: of the engine; without them it is the one that most files share.
        slow_v2: leave the V2 runner, whose kernels are interpreted, to `make test-rest`.
        v2: what the V2 runner needs besides.
    """
    v1, other = (V1, V2) if options is None else (options, {**options, "runner": "v2", **v2})
    settings = [v1, pytest.param(other, marks=pytest.mark.slow) if slow_v2 else other]
    ids = ["-".join(filter(None, (name, runner))) for runner in RUNNERS]
    return pytest.mark.parametrize("engine", settings, indirect=True, ids=ids)


def table(items: Iterable[pytest.Item]) -> str:
    """The Markdown table of what these tests say, one line for each feature."""
    cells: dict[str, dict[str, str]] = {}
    for item in items:
        for mark in item.iter_markers("combination"):
            for feature in mark.args:
                for runner in _runners(item):
                    reason = mark.kwargs.get("refused")
                    cell = f"refused: {reason}" if reason else "works"
                    cells.setdefault(feature, {})[runner] = cell
    head = "| beside steering | " + " | ".join(f"{runner.upper()} runner" for runner in RUNNERS) + " |"
    lines = [head, "|" + "---|" * (1 + len(RUNNERS))]
    for feature in sorted(cells, key=str.lower):
        row = [cells[feature].get(runner, "not tested") for runner in RUNNERS]
        lines.append(f"| {feature} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page, from a fresh collection of the engine tests."""
    return _HEAD + table(collect())


def collect() -> list[pytest.Item]:
    """The engine tests, not run."""

    class Keep:
        items: list[pytest.Item]

        def pytest_collection_finish(self, session: pytest.Session) -> None:
            self.items = session.items

    keep = Keep()
    folder = str(Path(__file__).parents[1] / "engine")
    with redirect_stdout(io.StringIO()) as told:
        code = pytest.main(["--collect-only", "--assert=plain", "-q", folder], plugins=[keep])
    assert code == pytest.ExitCode.OK, told.getvalue()
    return keep.items


def _runners(item: pytest.Item) -> tuple[str, ...]:
    """The runner that a test is parametrised by; both where it starts no engine."""
    call: Any = getattr(item, "callspec", None)
    if call is not None and "runner" in call.params:
        return (str(call.params["runner"]),)
    options = call.params.get("engine") if call is not None else None
    if not isinstance(options, dict):
        return RUNNERS if "engine" not in getattr(item, "fixturenames", ()) else ("v1",)
    return (str(options.get("runner", "v1")),)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
