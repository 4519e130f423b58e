"""`steering` in a body: found without decoding the bodies that have none, taken out of those that do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from steerserve.errors import RequestError, RouteError
from steerserve.spec import MAX_JSON_CHARS

from .places import FIELD, check_places, names_steering
from .xargs import check_xargs

__all__ = ["is_set", "take_steering"]


def _spelled(name: str) -> str:
    """A pattern of every way to write a name in a JSON string: each letter may be escaped."""
    digits = (f"{ord(letter):04x}" for letter in name)
    return "".join(rf"(?:{letter}|\\u(?i:{code}))" for letter, code in zip(name, digits, strict=True))


_KEY = re.compile(f'"{_spelled(FIELD)}"'.encode())
_OPTIONS = {name: re.compile(f'"{_spelled(name)}"'.encode()) for name in ("background", "use_beam_search")}
_FORM_FIELD = re.compile(
    rb"""content-disposition:[^\r\n]*[;\s]name\*?=(?:"|utf-8'[^']*')?steering["\s;\r\n]""", re.IGNORECASE
)


class _Repeated(dict[str, Any]):
    """An object that names a key twice; `keys_again` are those keys."""

    keys_again: frozenset[str]


def take_steering(
    body: bytes, content_type: str = "", path: str = ""
) -> tuple[object, dict[str, Any]] | None:
    """The value of a JSON body's top-level `steering`, and the body without it; None where there is none.

    Raises: RequestError if the body mentions the key but is not JSON, or repeats it or a key inside it;
        RouteError if it is a form with such a field, or has the key where the route at `path` reads none.
    """
    kind = content_type.lower().strip()
    if kind.startswith(("multipart/", "application/x-www-form-urlencoded")):
        _check_form(body, kind)
        return None
    mentioned = _KEY.search(body) is not None
    # A NUL byte means UTF-16 or UTF-32, which the server's own parser accepts too.
    if not mentioned and b"\0" not in body:
        return None
    try:
        document = json.loads(body, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        if not mentioned:
            return None
        raise RequestError(f"expected the body to be valid JSON: {error}", at=()) from None
    if not isinstance(document, dict):
        return None
    check_places(document, path)
    check_xargs(document)
    if FIELD not in document:
        return None
    if isinstance(document, _Repeated) and FIELD in document.keys_again:
        raise RequestError(f"expected `{FIELD}` once, got it twice")
    value = document.pop(FIELD)
    if len(body) > MAX_JSON_CHARS:
        _check_size(value)
    _check_keys(value)
    return value, document


def is_set(body: bytes | dict[str, Any], option: str) -> bool:
    """Whether `background` or `use_beam_search` is true; a body that was not decoded is searched first."""
    if isinstance(body, dict):
        return bool(body.get(option))
    if _OPTIONS[option].search(body) is None and b"\0" not in body:
        return False
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and bool(document.get(option))


def _check_form(body: bytes, kind: str) -> None:
    if _FORM_FIELD.search(body) if kind.startswith("multipart/") else names_steering(body):
        raise RouteError("expected no `steering` in a form, which cannot carry it", reason="route")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    marked = _Repeated(found)
    seen: set[str] = set()
    again: set[str] = set()
    for key, _ in pairs:
        (again if key in seen else seen).add(key)
    marked.keys_again = frozenset(again)
    return marked


def _check_keys(value: object) -> None:
    for path, item in _walk(value):
        if isinstance(item, _Repeated):
            key = min(item.keys_again)
            raise RequestError(f"expected each key once, got `{key[:64]}` twice", at=(*path, key[:64]))


def _walk(value: object) -> Iterator[tuple[tuple[str | int, ...], object]]:
    """Every value inside `value`, itself included, with its path into the body; no recursion."""
    stack: list[tuple[tuple[str | int, ...], object]] = [((FIELD,), value)]
    while stack:
        path, item = stack.pop()
        yield path, item
        if isinstance(item, dict):
            stack.extend(((*path, key[:64]), inner) for key, inner in item.items())
        elif isinstance(item, list):
            stack.extend(((*path, index), inner) for index, inner in enumerate(item))


def _check_size(value: object) -> None:
    size = len(json.dumps(value))
    if size > MAX_JSON_CHARS:
        message = f"expected `{FIELD}` of at most {MAX_JSON_CHARS} characters, got {size}"
        raise RequestError(message, reason="too_large")
