"""How much is done of what can be done at any length: random examples, hostile requests.

`make test` does a share of it and `make test-rest` the rest, so that both together do all of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

__all__ = ["REST", "amount", "scaled", "scaled_examples"]

REST = os.environ.get("STEERSERVE_TESTS") == "rest"

scaled = pytest.mark.scaled


def amount(whole: int, quick: int, variable: str = "") -> int:
    """How many are to be done now. Args: variable: of the environment, which may say something else."""
    return int(os.environ.get(variable) or (whole - quick if REST else quick))


def scaled_examples(whole: int, quick: int, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Hypothesis' settings for a test of that many examples."""
    return lambda test: scaled(settings(max_examples=amount(whole, quick), **options)(test))
