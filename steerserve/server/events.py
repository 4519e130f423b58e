"""Where a report goes in a reply, so that the APIs' own clients keep it; otherwise byte for byte.

A whole reply has it as its key `steering`. Of a stream the last events that say something have it: no event
is added, for clients take `choices[0]` of each, and the last `usage` for the whole. What puts a stream
together again keeps only what it knows, so it is also where each of them looks: in OpenAI's delta, which
becomes the message, in the `response` of a last event, and in Anthropic's `stop_details`.
"""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["error_in", "final_event", "held_from", "splice", "with_report"]

# A line begins behind LF, CR or CRLF; text inside JSON, its line ends escaped, cannot be there. One space may
# follow a field's colon.
_LINE = rb"(?:\A|(?<=[\r\n]))"
# Each API's last events.
_FINAL = re.compile(
    _LINE + rb"(?:data: ?\[DONE\](?=[\r\n]|\Z)"
    rb"|event: ?response\.(?:completed|incomplete)[\r\n]"
    rb"|event: ?message_(?:delta|stop)[\r\n]"
    rb'|data: ?\{"type": ?"message-end")'
)
_DATA = re.compile(_LINE + rb"data: ?([^\r\n]*)")
# In JSON no text holds these: it would escape their quotes.
_ENDS_A_CHOICE = re.compile(rb'"finish_reason": ?"')
_ONLY_USAGE = re.compile(rb'"choices": ?\[\]')
_HEAD = ("id", "object", "created", "model", "request_id")


def splice(body: bytes, report: dict[str, Any]) -> bytes:
    """The JSON object `body` with a last key `steering`; anything but an object is left alone."""
    stripped = body.rstrip()
    if not (stripped.startswith(b"{") and stripped.endswith(b"}")):
        return body
    if b'"stop_reason"' in body and (document := _load(stripped)).get("type") == "message":
        document["stop_details"] = _stop_details(document.get("stop_reason"), report)
        return _dump({**document, "steering": report})
    comma = b"" if stripped[1:-1].strip() == b"" else b","
    return stripped[:-1] + comma + b'"steering":' + _dump(report) + b"}"


def final_event(events: bytes) -> int | None:
    """Where in whole events the API's last ones begin; None if they are not among them."""
    found = _FINAL.search(events)
    return found.start() if found else None


def held_from(events: bytes) -> int:
    """Where in whole events those begin that may have to carry the report.

    It is the last chunk that ends a choice, if nothing but usage has followed it.
    """
    at = None
    for found in _DATA.finditer(events):
        if _ENDS_A_CHOICE.search(found[1]):
            at = found.start()
        elif not _ONLY_USAGE.search(found[1]):
            at = None
    return len(events) if at is None else at


def with_report(events: bytes, report: dict[str, Any], previous: bytes = b"") -> bytes:
    """The last events of a stream with the report in them.

    Args:
        events: those that may carry it; see `held_from` and `final_event`.
        previous: what came before them, whose last chunk lends its id and model to one of the report's own
            where a bare `[DONE]` is all that is left.
    """
    written, end, has_it = b"", 0, False
    for found in _DATA.finditer(events):
        data = found[1]
        if data == b"[DONE]" and not has_it:
            written += events[end : found.start()] + _own_chunk(report, previous)
            end = found.start()
        elif (told := _told(data, report)) is not None:
            has_it = True
            written += events[end : found.start(1)] + told
            end = found.end(1)
    return written + events[end:]


def _told(data: bytes, report: dict[str, Any]) -> bytes | None:
    """One event's data with the report; None if it is not its to carry."""
    if _ONLY_USAGE.search(data):
        return splice(data, report)
    document = _load(data)
    match document:
        case {"type": "response.completed" | "response.incomplete", "response": dict(response)}:
            response["steering"] = report
            return _dump(document)
        case {"type": "message_delta", "delta": dict(delta)}:
            delta["stop_details"] = _stop_details(delta.get("stop_reason"), report)
        case {"choices": list(choices)} if _ENDS_A_CHOICE.search(data):
            last = [choice for choice in choices if choice.get("finish_reason")][-1]
            if isinstance(last.get("delta"), dict):
                last["delta"]["steering"] = report
        case {"type": "message_stop" | "message-end"}:
            pass
        case _:
            return None
    return _dump({**document, "steering": report})


def _stop_details(stop_reason: object, report: dict[str, Any]) -> dict[str, Any]:
    """Anthropic's place for why and how a message ended; a refusal's is of a kind of its own."""
    if stop_reason == "refusal":
        return {"type": "refusal", "category": None, "explanation": None, "steering": report}
    return {"type": "steering", "steering": report}


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


def _load(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
