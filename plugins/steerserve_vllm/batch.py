"""Lines of a batch file are held to the rule of HTTP bodies, on the text that was written.

vLLM's models of a line drop keys that they do not know, so that what was said there is gone once it is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from steerserve.errors import RequestError
from steerserve.server.body import check_line

from .seams import wrap

__all__ = ["install", "refusal_of"]

_REFUSAL = "_steerserve_refusal"


def install() -> None:
    """Wrap the reading of a line."""
    wrap("run_batch_line", _wrap_line)


def refusal_of(request: Any) -> RequestError | None:
    """Why the line that a request was read from may not be run; None where it may."""
    error: RequestError | None = request.__dict__.get(_REFUSAL)
    return error


def _wrap_line(original: Callable[..., Any]) -> Callable[..., Any]:
    def read(json_data: str | bytes, *args: Any, **kwargs: Any) -> Any:
        text = json_data if isinstance(json_data, str) else json_data.decode("utf-8", "surrogateescape")
        try:
            check_line(text)
        except RequestError as error:
            return _refused(original, text, error)
        return original(json_data, *args, **kwargs)

    return read


def _refused(original: Callable[..., Any], text: str, error: RequestError) -> Any:
    """The line with a body that nothing is wrong with, marked: one refused line must not end the others."""
    try:
        line = json.loads(text)
        kept = {name: line[name] for name in ("custom_id", "method", "url")}
    except (ValueError, RecursionError, KeyError, TypeError):
        raise error from None
    request = original.__self__.model_construct(**kept, body=None)  # type: ignore[attr-defined]
    request.__dict__[_REFUSAL] = error
    return request
