"""`steering` in a body: found wherever its route reads it, taken out, and refused anywhere else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, cast
from urllib.parse import parse_qsl

from python_multipart import FormParser, create_form_parser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File

from steerserve.errors import RequestError, RouteError
from steerserve.spec import MAX_JSON_CHARS

from .free import Shape
from .json_text import Repeated, parse, parse_named
from .places import FIELD, check_document, check_fields, check_names, places_read
from .routing import check_options

__all__ = ["check_line", "is_set", "take_steering"]

# What a body that no parser understands must not hold; the second is how JSON hides an ASCII letter.
_MENTIONED = re.compile(rb"steer|interven|\\u00[2-7]", re.IGNORECASE)
_BODY = "body"


def take_steering(
    body: bytes, content_type: str = "", path: str = ""
) -> tuple[object, dict[str, Any]] | None:
    """What a body asks of us, wherever the route at `path` reads it, and the body without it.

    JSON text, as `vllm_xargs` carry it, is given as the value that it holds, so that all that is checked of
    the field is checked of it too. Returns: None where nothing is asked for.

    Raises: RequestError if the body mentions us but is not JSON, or says twice what it asks for;
        RouteError if it has a key that means us where nothing reads it, or is a form that has.
    """
    kind = content_type.lower().strip()
    if kind.startswith(("multipart/", "application/x-www-form-urlencoded")):
        check_fields(_form_fields(body, content_type), "a form")
        return None
    try:
        document, names = parse_named(body)
    except (ValueError, RecursionError) as error:
        # Without the zeros of UTF-16 and UTF-32, which the server's own parser takes too.
        if not _MENTIONED.search(body.replace(b"\0", b"")):
            return None
        raise RequestError(f"expected the body to be valid JSON: {error}", at=()) from None
    check_document(document, path, names)
    return _taken(document, path, body) if isinstance(document, dict) else None


def _taken(document: dict[str, Any], route: str, body: bytes) -> tuple[object, dict[str, Any]] | None:
    found = [place for place in places_read(route) if _holds(document, place)]
    if not found:
        return None
    at, *more = found
    if route.endswith("/render") and at != (FIELD,):
        # What is rendered is not run: it is read by the route that is asked to run it.
        return None
    if more:
        got = " and in ".join(f"`{place[0]}`" for place in more)
        raise RequestError(f"expected `{FIELD}` once, got it in the body and in {got}", at=more[0])
    value, rest = _without(document, at)
    if at != (FIELD,) and (isinstance(value, str) or at[0] == "vllm_xargs"):
        value = _decoded(value, at)
    elif len(body) > MAX_JSON_CHARS:
        _check_size(value)
    _check_keys(value)
    return value, rest


def _without(document: dict[str, Any], at: Shape) -> tuple[object, dict[str, Any]]:
    """What stands at a place, and the document without it; the one that was given stays as it is."""
    name, *inner = at
    rest = dict(document)
    if not inner:
        return rest.pop(name), rest
    value, rest[name] = _without(rest[name], tuple(inner))
    return value, rest


def check_line(line: str) -> None:
    """Check a line of a batch file as the body of its `url` is checked.

    One that asks for steering where its route reads it passes: admission takes it, or refuses it.

    Raises: RequestError.
    """
    try:
        document = parse(line)
    except (ValueError, RecursionError) as error:
        if not _MENTIONED.search(line.encode("utf-8", "surrogatepass")):
            return
        raise RequestError(f"expected the line to be valid JSON: {error}", at=()) from None
    if not isinstance(document, dict):
        return
    check_names({key: value for key, value in document.items() if key != _BODY}, ())
    if isinstance(document, Repeated):
        check_names([value for _, value in document.dropped], ())
    body = document.get(_BODY)
    url = str(document.get("url"))
    check_document(body, url)
    taken = _taken(body, url, line.encode("utf-8", "surrogatepass")) if isinstance(body, dict) else None
    if taken is None:
        return
    if FIELD in cast(dict[str, Any], body):
        message = f"expected `{FIELD}` of a batch file in `vllm_xargs`, as JSON text"
        raise RouteError(message, reason="route")
    check_options(taken[1])


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


def _spelled(name: str) -> str:
    """A pattern of every way to write a name in a JSON string: each letter may be escaped."""
    digits = (f"{ord(letter):04x}" for letter in name)
    return "".join(rf"(?:{letter}|\\u(?i:{code}))" for letter, code in zip(name, digits, strict=True))


_OPTIONS = {name: re.compile(f'"{_spelled(name)}"'.encode()) for name in ("background", "use_beam_search")}


def _holds(document: dict[str, Any], place: Shape) -> bool:
    value: object = document
    for key in place:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True


def _decoded(text: object, at: Shape) -> object:
    """What JSON text says.

    Raises: RequestError if it is none.
    """
    if not isinstance(text, str):
        kind = "an object" if isinstance(text, dict) else "something else"
        message = f"expected `{FIELD}` as JSON text here, got {kind}; at the top of the body it is an object"
        raise RequestError(message, at=at)
    if len(text) > MAX_JSON_CHARS:
        message = f"expected `{FIELD}` of at most {MAX_JSON_CHARS} characters, got {len(text)}"
        raise RequestError(message, reason="too_large")
    try:
        value: object = parse(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"expected `{FIELD}` to be valid JSON: {error}") from None
    return value


def _form_fields(body: bytes, content_type: str) -> Iterator[tuple[str, str]]:
    """The fields of a form, those that are files with no value.

    Raises: RouteError if the form cannot be read and mentions us.
    """
    if not content_type.lower().strip().startswith("multipart/"):
        yield from parse_qsl(body.decode("latin-1"), keep_blank_values=True)
        return
    found: list[tuple[str, str]] = []

    def on_field(field: Field) -> None:
        found.append((_text(field.field_name), _text(field.value)))

    def on_file(file: File) -> None:
        found.append((_text(file.field_name), ""))

    try:
        parser = create_form_parser({"Content-Type": content_type.encode("latin-1")}, on_field, on_file)
        assert isinstance(parser, FormParser)
        parser.config["MAX_MEMORY_FILE_SIZE"] = len(body) + 1
        parser.write(body)
    except (FormParserError, ValueError, KeyError) as error:
        if _MENTIONED.search(body):
            raise RouteError(f"expected a form that can be read: {error}", at=(), reason="route") from None
    yield from found


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")


def _check_keys(value: object) -> None:
    for path, item in _walk(value):
        if isinstance(item, Repeated):
            key = item.dropped[0][0][:64]
            raise RequestError(f"expected each key once, got `{key}` twice", at=(*path, key))


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
