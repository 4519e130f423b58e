"""Websocket sessions cannot carry steering: a message that asks for it ends the session."""

from __future__ import annotations

from starlette.types import Message, Receive, Scope, Send

from steerserve.errors import RequestError, RouteError
from steerserve.metrics import count_rejection

from .body import take_steering
from .places import check_head

__all__ = ["is_turned_away", "unsteered_only"]

_POLICY_VIOLATION = 1008


async def is_turned_away(scope: Scope, send: Send) -> bool:
    """Close a session that asks for steering in its query or a header. Returns: whether it did."""
    try:
        check_head(scope)
    except RequestError as error:
        count_rejection(error.reason)
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": str(error)[:120]})
        return True
    return False


def unsteered_only(receive: Receive, send: Send) -> Receive:
    """A `receive` that closes the session with the reason when a message asks for steering, anywhere."""

    async def checked() -> Message:
        message = await receive()
        error = _refusal(message) if message["type"] == "websocket.receive" else None
        if error is None:
            return message
        count_rejection(error.reason)
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": str(error)[:120]})
        return {"type": "websocket.disconnect", "code": _POLICY_VIOLATION}

    return checked


def _refusal(message: Message) -> RequestError | None:
    body = message.get("bytes") or (message.get("text") or "").encode("utf-8", "surrogatepass")
    try:
        if take_steering(body) is None:
            return None
    except RequestError as error:
        return error
    return RouteError("expected no `steering` on a websocket, which cannot carry it", reason="route")
