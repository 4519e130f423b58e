"""A steered request's reply on its way out: refused if it was not steered, else completed by its report."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Message, Send

from steerserve.carried import Carried
from steerserve.errors import RequestError, RouteError

from .events import error_in, final_event, held_from, splice, with_report
from .framing import EventFramer

__all__ = ["ReplyStopped", "SteeredReply"]

Report = dict[str, Any]
MAX_HELD = 1 << 20


class ReplyStopped(OSError):
    """Raised into the app once its reply was replaced by a refusal; as if the client had left."""


class SteeredReply:
    """The `send` of a request that asks for steering, or may be under a policy.

    A reply that is not a success passes untouched, unless admission said why it refused. A success is held
    back until the request was admitted, if it asks for steering, so that it can still become a
    refusal; a stream then flows as it comes, and only its last events wait: for the report, and for whatever
    must be on record before a reply ends. Without a wish for a report no byte of it changes.

    Args:
        carried: the request's steering.
        finish: called once before the reply ends; gives the report, or None where it was not asked for.
        refuse: turns the error of a request that was not steered as it must be into a reply.
    """

    def __init__(
        self,
        send: Send,
        carried: Carried,
        finish: Callable[[], Awaitable[Report | None]],
        refuse: Callable[[RequestError], JSONResponse],
    ) -> None:
        self._send = send
        self._carried = carried
        self._finish = finish
        self._refuse = refuse
        self._start: Message | None = None
        self._body = self._pass
        self._held = b""
        self._framer = EventFramer()
        self._last = b""
        self._report: Report | None = None
        self._finishing: asyncio.Future[Report | None] | None = None
        self._has_begun = False
        self.status: int | None = None
        self.asked = False
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

    async def replaced(self) -> bool:
        """The app failed. Returns: whether its reply is a refusal: one that was sent, or can be sent yet."""
        if not self.refused and self._carried.refused is not None and not self._has_begun:
            await self._replace()
        return self.refused

    async def _begin_with(self, start: Message) -> None:
        self._has_begun = True
        await self._send(start)

    async def _begin(self, message: Message) -> None:
        kind = dict(message.get("headers", ())).get(b"content-type", b"")
        self.status = message["status"]
        if not 200 <= message["status"] < 300:
            if self._carried.refused is not None:
                await self._replace()
            else:
                await self._begin_with(message)
            return
        self._start = message
        self._body = self._hold_events if kind.startswith(b"text/event-stream") else self._hold_whole

    async def _pass(self, body: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    @property
    def _is_sound(self) -> bool:
        """Whether the reply may begin: what asks for steering must have been admitted with it."""
        return self._carried.refused is None and (self._carried.own is None or self._carried.admitted > 0)

    async def _ask(self) -> Report | None:
        self.asked = True
        # A client that leaves now ends the app, and not what must be on record.
        self._finishing = asyncio.ensure_future(self._finish())
        return await asyncio.shield(self._finishing)

    async def settled(self) -> None:
        """Wait until whatever the reply's end waits for is done, if that has begun."""
        if self._finishing is not None:
            await asyncio.gather(self._finishing, return_exceptions=True)

    async def _hold_whole(self, body: bytes, more: bool) -> None:
        """Not a stream: all of it is held until it is complete."""
        self._held += body
        if more:
            return
        if not self._is_sound:
            await self._replace()
            return
        try:
            report = await self._ask()
        except RequestError as error:
            self._carried.refused = error
            await self._replace()
            return
        await self._flush_start(self._held if report is None else splice(self._held, report))

    async def _flush_start(self, body: bytes) -> None:
        assert self._start is not None
        headers = [pair for pair in self._start.get("headers", ()) if pair[0].lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._begin_with({**self._start, "headers": headers})
        await self._pass(body, False)

    async def _hold_events(self, body: bytes, more: bool) -> None:
        """A stream that was not admitted yet: some APIs announce a reply before they begin it."""
        self._held += body
        if self._is_sound:
            assert self._start is not None
            await self._begin_with(self._start)
            self._body = self._stream
            held, self._held = self._held, b""
            await self._stream(held, more)
        elif not more or len(self._held) > MAX_HELD or self._carried.refused is not None:
            await self._replace()

    async def _stream(self, body: bytes, more: bool) -> None:
        events, self._held = self._held + self._framer.feed(body), b""
        if not more:
            events += self._framer.rest()
        if not self.asked:
            final = final_event(events)
            at = held_from(events[:final])
            if final is None and more:
                events, self._held = events[:at], events[at:]
                self._last = events or self._last
            else:
                if at:
                    await self._pass(events[:at], True)
                    self._last, events = events[:at], events[at:]
                # Whatever fails here ends the stream without its last events: nobody may take it for a whole
                # one.
                self._report = await self._ask()
        if self._report is not None:
            events = with_report(events, self._report, self._last)
        if events or not more:
            await self._pass(events, more)

    async def _replace(self) -> None:
        """The engine never saw the steering: what the route answered must not pass for a steered reply."""
        self.refused = True
        error = error_in(self._held) if self._carried.refused is None else None
        if error is not None:
            code = error["error"].get("code")
            status = code if isinstance(code, int) and 400 <= code < 600 else 500
            response = JSONResponse(error, status_code=status)
        else:
            message = "expected a request that reaches the engine: this one cannot carry steering"
            response = self._refuse(self._carried.refused or RouteError(message, reason="route"))
        self.status = response.status_code
        await response({"type": "http"}, _no_receive, self._send)


async def _no_receive() -> Message:
    return {"type": "http.disconnect"}
