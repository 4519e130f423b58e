"""Wrapping vLLM's functions, once it is certain that all of them are what the wrappers were written for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from steerserve.config import parse_config
from steerserve.errors import IncompatibleError

from .compat import COHERE_SEAMS, FRONT_END_SEAMS, SEAMS, V2_SEAMS, VERSIONS, Seam, series

__all__ = [
    "COHERE_SEAMS",
    "FRONT_END_SEAMS",
    "SEAMS",
    "V2_SEAMS",
    "Seam",
    "check",
    "refuse_configuration",
    "wrap",
]


def check(seams: dict[str, Seam] = SEAMS) -> None:
    """Compare the version of this vLLM, and seams, with what is known.

    Raises: IncompatibleError listing all that differ, and the versions that are known.
    """
    import vllm

    problems = [problem for seam in seams.values() if (problem := seam.problem())]
    if series(vllm.__version__) not in VERSIONS:
        problems.insert(0, f"expected vLLM {' or '.join(VERSIONS)}")
    if problems:
        raise IncompatibleError(
            f"vLLM {vllm.__version__} differs from what steerserve wraps ({'; '.join(VERSIONS.values())});"
            f" nothing was patched. {'; '.join(problems)}"
        )


def refuse_configuration(error: IncompatibleError) -> None:
    """Make a vLLM that does not fit refuse every configuration that asks for steering, with this error."""
    from vllm.config import VllmConfig

    original = VllmConfig.__post_init__

    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if parse_config(self.additional_config) is not None:
            raise error
        original(self, *args, **kwargs)

    VllmConfig.__post_init__ = post_init


def wrap(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a seam's function by `make(original)`."""
    seam = (SEAMS | V2_SEAMS | FRONT_END_SEAMS | COHERE_SEAMS)[name]
    owner, attribute = seam.owner(), seam.name.rsplit(".", 1)[-1]
    original = getattr(owner, attribute)
    setattr(owner, attribute, functools.wraps(original)(make(original)))
