"""`steering` by `vllm_xargs`, which vLLM hands on as text or numbers alone."""

from __future__ import annotations

from typing import Any

from steerserve.errors import RequestError
from steerserve.spec import kind_of

__all__ = ["check_xargs"]


def check_xargs(document: dict[str, Any]) -> None:
    """Refuse a `vllm_xargs.steering` that is not text, before vLLM's own check of every form it might have.

    Raises: RequestError.
    """
    given = document.get("vllm_xargs")
    if isinstance(given, dict) and not isinstance(given.get("steering", ""), str):
        message = (
            f"expected `vllm_xargs.steering` to be a string of JSON, got {kind_of(given['steering'])}: put "
            "`steering` at the top of the body instead, or its JSON text here"
        )
        raise RequestError(message, at=("vllm_xargs", "steering"))
