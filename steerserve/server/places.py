"""The rule against silence: no key that means us passes unread.

Such a key is one that `names.means_us` says is one, wherever it stands in a request: read where the route
reads it, refused everywhere else. Only what a client may name as it likes is not looked at (`free.py`). An
object of the shape of an intervention is refused like one, and JSON text in a field that is not for text
counts as JSON.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from urllib.parse import parse_qsl

from starlette.datastructures import Headers
from starlette.types import Scope

from steerserve.errors import RequestError, RouteError

from .free import Free, Shape, free_of, is_text
from .json_text import Repeated, parse_named
from .names import is_nearly, means_us, resembles_us

__all__ = ["FIELD", "Place", "check_document", "check_fields", "check_head", "check_names", "places_read"]

FIELD = "steering"
Place = tuple[str | int, ...]
_Part = TypeVar("_Part", bound=str | int)

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
_XARGS: Shape = ("vllm_xargs", FIELD)
_PARAMS: Shape = ("sampling_params", "extra_args", FIELD)

_MOST_ALIKE = 2000
_DEEPEST = 16
_JSON = re.compile(r"\s*[{\[]")
_NUMBERS = (int, float, bool, type(None))


def places_read(route: str) -> tuple[Shape, ...]:
    """Where the route reads steering, the field itself first.

    A route that carries none reads the field too: to refuse it by the route's name.
    """
    # What is rendered goes on, whole, to a route that reads it.
    if route in _READ_XARGS or route.endswith("/render"):
        return (FIELD,), _XARGS
    return ((FIELD,), _PARAMS) if route == _READS_PARAMS else ((FIELD,),)


def check_document(document: object, route: str, names: Collection[str] | None = None) -> None:
    """Refuse a body that says anywhere, but where the route reads it, what means us.

    Args: names: every key in it, where they are known: most bodies need not be walked over then.
    Raises: RequestError for what is said twice, RouteError naming the place for anything else.
    """
    if names is not None:
        _check_count(names)
        if type(document) is dict and not any(map(_may_ask, names)):
            # JSON text may still have such keys.
            document = {name: value for name, value in document.items() if not is_text((name,))}
    _Walk(free_of(route), places_read(route)).check(document)


def check_names(value: object, at: Place, route: str = "") -> None:
    """Refuse names that mean us in a value that stands at `at` in a body for the route, and is read nowhere.

    Raises: RouteError naming the place.
    """
    shape = tuple(part if isinstance(part, str) else "[]" for part in at)
    _Walk(free_of(route), ()).check(value, at, shape)


def check_fields(fields: Iterable[tuple[str, str]], what: str) -> None:
    """Refuse fields of a form or a query that mean us; `a[b]` and `a.b` name what stands in `a`.

    Args: what: the form or the query, in words.
    Raises: RouteError.
    """
    for name, value in fields:
        parts = [part for part in re.split(r"[\[\].]+", name) if part]
        if any(means_us(part) for part in parts):
            message = f"expected `{FIELD}` in a JSON body, got `{name[:64]}` in {what}, which cannot carry it"
            raise RouteError(message, reason="route")
        check_names(value, tuple(parts[:1]))


def check_head(scope: Scope) -> None:
    """Refuse steering in the query or as a header, a body that nobody can look into, and a path that only
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
    query = scope.get("query_string", b"").decode("latin-1")
    check_fields(parse_qsl(query, keep_blank_values=True), "the query")
    for name in headers:
        # Not by a part of the name: proxies add headers about the steering of traffic.
        if is_nearly(name.removeprefix("x-")):
            message = f"expected `{FIELD}` in the body, got the header `{name[:64]}`, which nothing reads"
            raise RouteError(message, reason="route")


@dataclass
class _Walk:
    """Over a value and all that stands in it; no recursion, for bodies are nested as their senders like."""

    free: Free
    reads: tuple[Shape, ...]

    def check(self, value: object, at: Place = (), shape: Shape = ()) -> None:
        stack = [(value, at, shape)]
        while stack:
            found = list(self._inside(*stack.pop()))
            stack.extend(reversed(found))

    def _inside(self, value: object, at: Place, shape: Shape) -> Iterator[tuple[object, Place, Shape]]:
        if isinstance(value, Mapping):
            yield from self._in_object(value, at, shape)
        elif isinstance(value, list | tuple):
            inner = _longer(shape, "[]")
            if inner not in self.free.below:
                held = [(i, item) for i, item in enumerate(value) if type(item) not in _NUMBERS]
                yield from ((item, _longer(at, i), inner) for i, item in held)
        elif isinstance(value, str) and not is_text(shape):
            # No route reads what text holds.
            _Walk(self.free, ()).check(_json_in(value), at, shape)

    def _in_object(
        self, item: Mapping[Any, Any], at: Place, shape: Shape
    ) -> Iterator[tuple[object, Place, Shape]]:
        if "op" in item and ("feature" in item or "direction" in item):
            message = f"expected interventions in `{FIELD}` at the top of the body: nothing reads this one"
            raise RouteError(message, at=at, reason="route")
        if isinstance(item, Repeated):
            self._check_once(item.dropped, at, shape)
        named = shape in self.free.keys
        for key, value in item.items():
            if not isinstance(key, str):
                continue
            inner = _longer(shape, "*" if named else key)
            if inner in self.free.below or inner in self.reads:
                continue
            place = _longer(at, key[:64])
            if not named and means_us(key):
                raise RouteError(_refusal(key), at=place, reason="route")
            if type(value) not in _NUMBERS:
                yield value, place, inner

    def _check_once(self, dropped: Iterable[tuple[str, Any]], at: Place, shape: Shape) -> None:
        """Of two values of one key a parser keeps one: it may not be the other that asks for steering."""
        for key, value in dropped:
            inner = (*shape, key)
            if inner in self.reads:
                raise RequestError(f"expected `{FIELD}` once, got it twice", at=(*at, key))
            if inner not in self.free.below:
                _Walk(self.free, ()).check(value, (*at, key[:64]), inner)


def _longer(path: tuple[_Part, ...], part: _Part) -> tuple[_Part, ...]:
    """The path to a part; of very deep ones the beginning, for no place that matters lies so deep."""
    return (*path, part) if len(path) < _DEEPEST else path


def _check_count(names: Collection[str]) -> None:
    """Nobody may keep the server busy with names that nearly mean us.

    Raises: RequestError.
    """
    if len(names) > _MOST_ALIKE and sum(map(resembles_us, names)) > _MOST_ALIKE:
        message = f"expected at most {_MOST_ALIKE} keys that resemble `{FIELD}`, got more"
        raise RequestError(message, at=(), reason="too_many")


def _may_ask(name: str) -> bool:
    return name == "op" or means_us(name)


def _refusal(key: str) -> str:
    got = "it here" if key == FIELD else f"`{key[:64]}`"
    return f"expected `{FIELD}` at the top of the body, got {got}: nothing reads it there"


def _json_in(text: str) -> object | None:
    """What JSON text holds, if that is an object or a list."""
    if _JSON.match(text) is None:
        return None
    try:
        found, names = parse_named(text)
    except (ValueError, RecursionError):
        return None
    _check_count(names)
    return cast(object, found)
