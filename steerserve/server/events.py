"""Where a report goes in a reply: into its JSON, or the last event of its stream, otherwise byte for byte."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["error_in", "final_event", "splice", "with_report"]

# A line begins behind LF, CR or CRLF; text inside JSON, its line ends escaped, cannot be there. One space may
# follow a field's colon.
_LINE = rb"(?:\A|(?<=[\r\n]))"
# Each API's last event.
_FINAL = re.compile(
    _LINE + rb"(?:data: ?\[DONE\](?=[\r\n]|\Z)"
    rb"|event: ?response\.(?:completed|incomplete)[\r\n]"
    rb"|event: ?message_stop[\r\n]"
    rb'|data: ?\{"type": ?"message-end")'
)
_DATA = re.compile(_LINE + rb"data: ?([^\r\n]*)")
_HEAD = ("id", "object", "created", "model", "request_id")


def splice(body: bytes, report: dict[str, Any]) -> bytes:
    """The JSON object `body` with a last key `steering`; anything but an object is left alone."""
    stripped = body.rstrip()
    if not (stripped.startswith(b"{") and stripped.endswith(b"}")):
        return body
    comma = b"" if stripped[1:-1].strip() == b"" else b","
    return stripped[:-1] + comma + b'"steering":' + _dump(report) + b"}"


def final_event(events: bytes) -> int | None:
    """Where in whole events the API's last one begins; None if it is not among them."""
    found = _FINAL.search(events)
    return found.start() if found else None


def with_report(event: bytes, report: dict[str, Any], previous: bytes) -> bytes:
    """The last event with the report in it, or before it where the event is a bare `[DONE]`.

    Args:
        event: the events from the last one on.
        previous: the events before it, whose last one lends its id and model to a chunk of the report's own.
    """
    found = _DATA.search(event)
    assert found is not None
    data = found[1]
    if data == b"[DONE]":
        return _own_chunk(report, previous) + event
    data = _in_response(data, report) if b'"response":' in data else splice(data, report)
    return event[: found.start(1)] + data + event[found.end(1) :]


def error_in(events: bytes) -> dict[str, Any] | None:
    """The first error object that a stream's events carry."""
    for data in _DATA.findall(events):
        if data.startswith(b"{") and b'"error"' in data:
            document = _load(data)
            if isinstance(document.get("error"), dict):
                return document
    return None


def _own_chunk(report: dict[str, Any], previous: bytes) -> bytes:
    data = [data for data in _DATA.findall(previous) if data.startswith(b"{")]
    last = _load(data[-1]) if data else {}
    if "error" in last:
        return b""
    head = {key: last[key] for key in _HEAD if key in last}
    return b"data: " + _dump({**head, "choices": [], "steering": report}) + b"\n\n"


def _in_response(data: bytes, report: dict[str, Any]) -> bytes:
    document = json.loads(data)
    document["response"]["steering"] = report
    return _dump(document)


def _load(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
