"""Takes `steering` out of every body that has one, and answers for what becomes of it."""

from __future__ import annotations

import json
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steerserve.carried import CARRIED, Carried
from steerserve.errors import RequestError, RouteError
from steerserve.metrics import count_rejection
from steerserve.plan import compile_plan
from steerserve.spec import parse_spec

from .body import take_steering
from .refusal import refusal
from .reply import SteeredReply
from .routing import check_options, check_route, path_of
from .state import SteeringState
from .websocket import unsteered_only

__all__ = ["SteeringMiddleware"]

_WITH_BODY = ("PATCH", "POST", "PUT")


class SteeringMiddleware:
    """Pure ASGI, inside authentication and outside every route.

    A request without `steering` reaches the app with the bytes that came. One with it is checked to the last
    field before the app sees any of it; the app runs in a context that carries the plan to admission.
    """

    def __init__(self, app: ASGIApp, state: SteeringState) -> None:
        self.app = app
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] in _WITH_BODY:
            await self._handle(scope, receive, send)
        elif scope["type"] == "websocket":
            await self.app(scope, unsteered_only(receive, send), send)
        else:
            await self.app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        finally:
            await self.state.close()

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        if body is None:
            return
        try:
            taken = take_steering(body, Headers(scope=scope).get("content-type", ""))
            carried = None if taken is None else self._compile(path_of(scope), *taken)
        except RequestError as error:
            count_rejection(error.reason)
            await refusal(error, path_of(scope))(scope, receive, send)
            return
        if taken is None or carried is None:
            await self.app(scope, _replay(body, receive), send)
            return
        scope, body = _with_body(scope, taken[1])
        await self._steer(scope, _replay(body, receive), send, carried)

    def _compile(self, path: str, value: object, rest: dict[str, Any]) -> Carried:
        """Check everything about a request that can be known before the engine sees it.

        Raises: RequestError naming the first field that is wrong.
        """
        check_route(path)
        if self.state.catalog is None:
            raise RouteError("expected no `steering`: no SAE is served here", reason="not_configured")
        started = time.perf_counter()
        spec = parse_spec(value)
        check_options(rest)
        plan = compile_plan(spec, self.state.catalog)
        return Carried(spec, plan, seconds=time.perf_counter() - started)

    async def _steer(self, scope: Scope, receive: Receive, send: Send, carried: Carried) -> None:
        async def make_report() -> dict[str, Any] | None:
            return await self._report(carried)

        def refuse(error: RouteError) -> JSONResponse:
            count_rejection(error.reason)
            return refusal(error, path_of(scope))

        reply = SteeredReply(send, carried, make_report, refuse)
        token = CARRIED.set(carried)
        try:
            await self.app(scope, receive, reply.send)
        except Exception:
            if not reply.refused:
                raise
        finally:
            CARRIED.reset(token)
            if carried.spec.report and not reply.finished and self.state.collector is not None:
                self.state.collector.abandon(carried.ticket)

    async def _report(self, carried: Carried) -> dict[str, Any] | None:
        state = self.state
        if not carried.spec.report or state.collector is None or state.reporter is None:
            return None
        tally = await state.collector.collect(carried.ticket)
        return state.reporter.report(carried.spec, carried.plan, tally, admitted=carried.admitted)


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


def _with_body(scope: Scope, document: dict[str, Any]) -> tuple[Scope, bytes]:
    """The scope and bytes of a request with this JSON body instead."""
    body = json.dumps(document).encode()
    headers = MutableHeaders(raw=list(scope["headers"]))
    headers["content-length"] = str(len(body))
    return {**scope, "headers": headers.raw}, body
