"""Runs a property under atheris, which follows coverage; without it, on random bytes."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from tests.support.scale import amount

__all__ = ["EXAMPLES", "examine", "run"]

# For a run by hand: 4000, which makes more than 20,000 in all.
EXAMPLES = amount(150, 40, "FUZZ_EXAMPLES")
_BYTES = 4096
_PHASES = (Phase.explicit, Phase.generate, Phase.shrink)


def examine(values: SearchStrategy[Any], holds: Callable[[Any], None], examples: int = EXAMPLES) -> None:
    """Hold a property to many values."""
    settings(
        max_examples=examples,
        database=None,
        phases=_PHASES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(given(values)(holds))()


def run(values: SearchStrategy[Any], holds: Callable[[Any], None]) -> None:
    """`python -m tests.fuzz.NAME [buffers]`; with atheris, its own arguments."""
    target = given(values)(holds).hypothesis.fuzz_one_input  # type: ignore[attr-defined]
    try:
        import atheris
    except ImportError:
        rng = random.Random(0)
        count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
        for _ in range(count):
            target(rng.randbytes(rng.randrange(_BYTES)))
        print(
            f"{count} buffers of random bytes, no failure; with atheris installed they would be chosen better"
        )
        return
    for function in _ours():
        atheris.instrument_func(function)
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


def _ours() -> list[FunctionType]:
    """The functions whose coverage is followed; the targets have imported them already."""
    modules = [module for name, module in sys.modules.items() if name.startswith("steerserve.")]
    values = [value for module in modules for value in vars(module).values()]
    return [value for value in values if isinstance(value, FunctionType) and "steerserve" in value.__module__]
