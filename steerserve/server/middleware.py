"""Takes `steering` out of every body that has one, and answers for what becomes of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steerserve import compiling
from steerserve.access.permission import check_may_steer
from steerserve.carried import CARRIED, Carried
from steerserve.catalog import NO_SAE
from steerserve.compile import compile_plan
from steerserve.errors import RequestError, RouteError
from steerserve.metrics import count_rejection, observe_watches
from steerserve.policy.enforcement import Caller
from steerserve.report import TicketTally
from steerserve.spec import parse_spec

from .body import is_set, take_steering
from .guard import principal_of
from .places import check_head
from .refusal import refusal
from .reply import SteeredReply
from .reporting import report_of
from .routing import CARRYING, check_options, check_route, path_of
from .state import SteeringState
from .websocket import is_turned_away, unsteered_only

__all__ = ["SteeringMiddleware"]

_WITH_BODY = ("PATCH", "POST", "PUT")


class SteeringMiddleware:
    """Pure ASGI, inside authentication and outside every route.

    A request that neither asks for steering nor is under a policy reaches the app with the bytes that came.
    What one asks for is checked to the last field before the app sees any of it; the app runs in a context
    that carries it to admission, with who asks and by which route.
    """

    def __init__(self, app: ASGIApp, state: SteeringState) -> None:
        self.app = app
        self.state = state
        self._leaving: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http" and _may_steer(scope):
            await self._handle(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._converse(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        finally:
            await asyncio.gather(*self._leaving, return_exceptions=True)
            await self.state.close()

    async def _converse(self, scope: Scope, receive: Receive, send: Send) -> None:
        if await is_turned_away(scope, send):
            return
        carried = await self._carried(scope)
        with _carrying(carried):
            try:
                await self.app(scope, unsteered_only(receive, send), send)
            finally:
                self._forget(carried)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        if body is None:
            return
        carried = await self._carried(scope)
        try:
            check_head(scope)
            taken = take_steering(body, Headers(scope=scope).get("content-type", ""), path_of(scope))
            if taken is not None:
                await self._compile(path_of(scope), *taken, carried)
            self._check_alone(path_of(scope), body if taken is None else taken[1], carried)
            if taken is not None:
                scope, body = _with_body(scope, taken[1])
        except RequestError as error:
            count_rejection(error.reason)
            reply = refusal(error, path_of(scope))
            await self.state.recorder.refused(scope, carried, error)
            await reply(scope, receive, send)
            return
        if taken is None and not self.state.is_guarded:
            await self.app(scope, _replay(body, receive), send)
            return
        await self._steer(scope, _noting_who_leaves(_replay(body, receive), carried), send, carried)

    async def _carried(self, scope: Scope) -> Carried:
        principal, enforcement = principal_of(scope), self.state.enforcement
        caller = Caller((), path_of(scope), principal.scopes, principal.name)
        in_force = None if enforcement is None else await enforcement.current_async()
        return Carried(caller=caller, principal=principal, in_force=in_force)

    async def _compile(self, path: str, value: object, rest: dict[str, Any], carried: Carried) -> None:
        """Check everything about a request that can be known before the engine sees it.

        Raises: RequestError naming the first field that is wrong.
        """
        check_route(path)
        if self.state.catalog is None:
            raise RouteError(f"expected no `steering`: {NO_SAE}", reason="not_configured")
        check_may_steer(carried.principal)
        started = time.perf_counter()
        carried.spec = parse_spec(value)
        check_options(rest)
        if self.state.catalog.reads_disk:
            carried.own = await compiling.run(compile_plan, carried.spec, self.state.catalog)
        else:
            carried.own = compile_plan(carried.spec, self.state.catalog)
        carried.check(carried.own, self.state.catalog)
        carried.seconds = time.perf_counter() - started

    def _check_alone(self, path: str, body: bytes | dict[str, Any], carried: Carried) -> None:
        """Refuse what policies cannot be enforced on, and everything while it could not be audited.

        Raises: RouteError or UnavailableError.
        """
        if carried.in_force is None or path not in CARRYING:
            return
        self.state.recorder.check(carried)
        if is_set(body, "use_beam_search"):
            carried.in_force.check_beams()
        if is_set(body, "background"):
            message = "expected no `background`: what policies do is put on record as the reply ends"
            raise RouteError(message, at=("background",), reason="combination")

    async def _steer(self, scope: Scope, receive: Receive, send: Send, carried: Carried) -> None:
        async def finish() -> dict[str, Any] | None:
            return await self._finish(scope, carried)

        def refuse(error: RequestError) -> JSONResponse:
            count_rejection(error.reason)
            return refusal(error, path_of(scope))

        reply = SteeredReply(send, carried, finish, refuse)
        with _carrying(carried):
            try:
                await self.app(scope, receive, reply.send)
            except Exception:
                if not await reply.replaced():
                    raise
            finally:
                # Whoever ends this task, because its client left, does not end what must be put on record.
                leaving = asyncio.create_task(self._leave(scope, carried, reply))
                self._leaving.add(leaving)
                leaving.add_done_callback(self._leaving.discard)
                await asyncio.shield(leaving)

    async def _leave(self, scope: Scope, carried: Carried, reply: SteeredReply) -> None:
        """However it ended: what no reply waited for is counted, put on record, and forgotten."""
        tally = None
        await reply.settled()
        if carried.admitted and not reply.asked:
            # Before it is known where its requests ended, none of their tokens can be told from the others.
            await carried.ends.settled()
            if carried.merged.policies or self.state.recorder.log is not None:
                tally = await self._counted(carried)
            else:
                self._forget(carried)
        await self.state.recorder.ended(scope, carried, reply, tally)

    def _forget(self, carried: Carried) -> None:
        if carried.admitted and self.state.collector is not None:
            self.state.collector.abandon(carried.ticket, carried.ends.known)

    async def _counted(self, carried: Carried) -> TicketTally | None:
        """What the workers counted of it; None if they do not answer. Metrics of watches take it in."""
        if self.state.collector is None:
            return None
        tally = await self.state.collector.collect(carried.ticket, carried.ends.known)
        observe_watches(carried.merged, tally)
        return tally

    async def _finish(self, scope: Scope, carried: Carried) -> dict[str, Any] | None:
        """What the reply's end waits for: the counts, their report where it is wanted, and the record.

        Raises: UnavailableError if the record cannot be written.
        """
        state, tally = self.state, None
        if carried.left:
            await carried.ends.settled()
        if carried.counts or state.recorder.log is not None:
            tally = await self._counted(carried)
        else:
            self._forget(carried)
        await state.recorder.served(scope, carried, tally)
        report = None if state.reporter is None else report_of(carried, state.reporter, tally)
        if report is not None and carried.keep is not None:
            carried.keep(report)
        return report


@contextmanager
def _carrying(carried: Carried) -> Iterator[None]:
    token = CARRIED.set(carried)
    try:
        yield
    finally:
        CARRIED.reset(token)


def _may_steer(scope: Scope) -> bool:
    """Whether a request has a body that `steering` could be in; a policy's document only speaks of it."""
    return scope["method"] in _WITH_BODY and not path_of(scope).startswith("/v1/steering/")


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if the client left while sending it."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body again, then whatever else comes: above all, that the client left."""
    replayed = False

    async def again() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _noting_who_leaves(receive: Receive, carried: Carried) -> Receive:
    """A `receive` that notes it if the client leaves, whatever the app then makes of its reply."""

    async def noting() -> Message:
        message = await receive()
        carried.left = carried.left or message["type"] == "http.disconnect"
        return message

    return noting


def _with_body(scope: Scope, document: dict[str, Any]) -> tuple[Scope, bytes]:
    """The scope and bytes of a request with this JSON body instead.

    Raises: RequestError if it is nested more deeply than can be written.
    """
    try:
        body = json.dumps(document).encode()
    except RecursionError:
        raise RequestError("expected a body that is nested less deeply", at=()) from None
    headers = MutableHeaders(raw=list(scope["headers"]))
    headers["content-length"] = str(len(body))
    return {**scope, "headers": headers.raw}, body
