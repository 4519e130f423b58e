"""A steered request's reply on its way out: refused if it was not steered, else completed by its report."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Message, Send

from steerserve.carried import Carried
from steerserve.errors import RouteError

from .events import error_in, final_event, splice, with_report

__all__ = ["ReplyStopped", "SteeredReply"]

Report = dict[str, Any]
MAX_HELD = 1 << 20


class ReplyStopped(OSError):
    """Raised into the app once its reply was replaced by a refusal; as if the client had left."""


class SteeredReply:
    """The `send` of a steered request.

    A reply that is not a success passes untouched. A success is held back until the request was admitted, so
    that it can still become a refusal; a stream then flows as it comes, and only its last event waits for the
    report.

    Args:
        carried: the request's steering.
        make_report: gives the report, or None where it was not asked for.
        refuse: turns the error of a route that dropped the steering into a reply.
    """

    def __init__(
        self,
        send: Send,
        carried: Carried,
        make_report: Callable[[], Awaitable[Report | None]],
        refuse: Callable[[RouteError], JSONResponse],
    ) -> None:
        self._send = send
        self._carried = carried
        self._make_report = make_report
        self._refuse = refuse
        self._start: Message | None = None
        self._body = self._pass
        self._held = b""
        self._last = b""
        self._reported = False
        self.finished = False
        self.refused = False

    async def send(self, message: Message) -> None:
        """Take one ASGI message of the app's reply."""
        if self.refused:
            raise ReplyStopped
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body":
            more = bool(message.get("more_body", False))
            await self._body(message.get("body", b""), more)
            self.finished = not more
        else:
            await self._send(message)

    async def _begin(self, message: Message) -> None:
        kind = dict(message.get("headers", ())).get(b"content-type", b"")
        if not 200 <= message["status"] < 300:
            await self._send(message)
            return
        self._start = message
        self._body = self._hold_events if kind.startswith(b"text/event-stream") else self._hold_whole

    async def _pass(self, body: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _hold_whole(self, body: bytes, more: bool) -> None:
        """Not a stream: all of it is held until it is complete."""
        self._held += body
        if more:
            return
        if not self._carried.admitted:
            await self._replace()
            return
        report = await self._make_report()
        await self._flush_start(self._held if report is None else splice(self._held, report))

    async def _flush_start(self, body: bytes) -> None:
        assert self._start is not None
        headers = [pair for pair in self._start.get("headers", ()) if pair[0].lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._pass(body, False)

    async def _hold_events(self, body: bytes, more: bool) -> None:
        """A stream that was not admitted yet: some APIs announce a reply before they begin it."""
        self._held += body
        if self._carried.admitted:
            assert self._start is not None
            await self._send(self._start)
            self._body = self._stream
            held, self._held = self._held, b""
            await self._stream(held, more)
        elif not more or len(self._held) > MAX_HELD:
            await self._replace()

    async def _stream(self, body: bytes, more: bool) -> None:
        if self._reported or not self._carried.spec.report:
            await self._pass(body, more)
            return
        events = self._held + body
        whole = (events.rfind(b"\n\n") + 2 if b"\n\n" in events else 0) if more else len(events)
        events, self._held = events[:whole], events[whole:]
        at = final_event(events)
        if at is not None:
            before, events = events[:at], events[at:]
            if before:
                await self._pass(before, True)
            report = await self._make_report()
            self._reported = True
            if report is not None:
                events = with_report(events, report, before or self._last)
        if events or not more:
            await self._pass(events, more)
            self._last = events

    async def _replace(self) -> None:
        """The engine never saw the steering: what the route answered must not pass for a steered reply."""
        self.refused = True
        error = error_in(self._held)
        if error is not None:
            code = error["error"].get("code")
            status = code if isinstance(code, int) and 400 <= code < 600 else 500
            response = JSONResponse(error, status_code=status)
        else:
            message = "expected a request that reaches the engine: this one cannot carry steering"
            response = self._refuse(RouteError(message, reason="route"))
        await response({"type": "http"}, _no_receive, self._send)


async def _no_receive() -> Message:
    return {"type": "http.disconnect"}
