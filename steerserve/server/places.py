"""Where `steering` may not stand: places that look right, and that no route reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from starlette.datastructures import Headers
from starlette.types import Scope

from steerserve.errors import RouteError

__all__ = ["FIELD", "check_head", "check_places", "names_steering"]

FIELD = "steering"

# Whose `vllm_xargs` become a request's `extra_args`.
_READ_XARGS = (
    "/invocations",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
)
_READS_PARAMS = "/inference/v1/generate"


def check_head(scope: Scope) -> None:
    """Refuse `steering` in the query or as a header, a body that nobody can look into, and a path that only
    seems to be a route's.

    Raises: RouteError.
    """
    headers = Headers(scope=scope)
    if "\n" in str(scope["path"]):
        # Starlette's patterns end in `$`, which a line feed may follow: the route would be reached by a path
        # that no policy and no rule names.
        raise RouteError("expected a path without line feeds", at=(), reason="route")
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        message = "expected a body without `content-encoding`, which is not decoded here"
        raise RouteError(message, at=("headers", "content-encoding"), reason="route")
    if names_steering(scope.get("query_string", b"")) or FIELD in headers:
        message = f"expected `{FIELD}` in the body, got it in the query or as a header, which nothing reads"
        raise RouteError(message, reason="route")


def names_steering(form: bytes) -> bool:
    """Whether `steering` is a field of a query, or of a form that is written as one."""
    return any(name == FIELD for name, _ in parse_qsl(form.decode("latin-1"), keep_blank_values=True))


def check_places(document: dict[str, Any], path: str) -> None:
    """Refuse `steering` where clients put it by mistake, and where it would be passed over.

    Raises: RouteError naming the place.
    """
    for place in _misplaced(document, path):
        message = f"expected `{FIELD}` at the top of the body: nothing reads it there"
        raise RouteError(message, at=place, reason="route")


def _misplaced(document: dict[str, Any], path: str) -> Iterator[tuple[str | int, ...]]:
    for name in ("extra_args", "extra_body", "sampling_params"):
        if FIELD in _object(document.get(name)):
            yield name, FIELD
    params = _object(document.get("sampling_params"))
    if path != _READS_PARAMS and FIELD in _object(params.get("extra_args")):
        yield "sampling_params", "extra_args", FIELD
    # What is rendered goes on to a route that reads it.
    reads_xargs = path in _READ_XARGS or path.endswith("/render")
    if not reads_xargs and FIELD in _object(document.get("vllm_xargs")):
        yield "vllm_xargs", FIELD
    for name in ("messages", "input"):
        yield from _in_turns(document.get(name), (name,))


def _in_turns(turns: object, place: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """In a message, beside its role; the messages of a batch are lists of lists."""
    for index, turn in enumerate(turns if isinstance(turns, list) else ()):
        if isinstance(turn, dict) and FIELD in turn:
            yield *place, index, FIELD
        elif isinstance(turn, list) and len(place) == 1:
            yield from _in_turns(turn, (*place, index))


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
