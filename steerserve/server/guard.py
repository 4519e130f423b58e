"""Who calls, and whether they may: before anything else of ours sees the request."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from steerserve.access.keyring import KeyRing
from steerserve.access.metrics import count_refusal
from steerserve.access.permission import check_scope
from steerserve.access.principal import ANYONE, NOBODY, SERVER_KEY, Principal
from steerserve.access.rate import RateExceededError, RateLimiter
from steerserve.access.scopes import required_scope, runs_model
from steerserve.errors import RequestError, UnauthenticatedError, UnavailableError

from .refusal import refusal
from .routing import path_of

__all__ = ["PRINCIPAL", "GuardState", "KeyGuard", "principal_of"]

PRINCIPAL = "steerserve.principal"
_POLICY_VIOLATION = 1008
_MAX_REASON_BYTES = 123


class GuardState(Protocol):
    """What the guard reads anew for each request."""

    @property
    def keys(self) -> KeyRing | None:
        """The keys; None where none are configured, and everyone may do everything."""

    @property
    def server_keys(self) -> tuple[str, ...]:
        """The server's own keys, of `--api-key`, which may do everything."""

    def denied(self, scope: Scope, error: RequestError) -> None:
        """Told of every request that is turned away."""


def principal_of(scope: Mapping[str, Any]) -> Principal:
    """Who sent the request."""
    principal: Principal = scope.get(PRINCIPAL, ANYONE)
    return principal


class KeyGuard:
    """Pure ASGI, inside the server's own authentication and outside of everything of ours."""

    def __init__(self, app: ASGIApp, state: GuardState) -> None:
        self.app = app
        self.state = state
        self._rates = RateLimiter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            try:
                await self._admit(scope)
            except RequestError as error:
                count_refusal(error.reason)
                self.state.denied(scope, error)
                await _refuse(error, scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _admit(self, scope: Scope) -> None:
        """Note in the scope who sends the request, and whether they may.

        Raises: UnauthenticatedError, ForbiddenError, RateExceededError or UnavailableError.
        """
        is_http, path = scope["type"] == "http", path_of(scope)
        needed = required_scope(scope["method"], path) if is_http else "infer"
        principal = await self._who(_key_of(Headers(scope=scope)), is_open=needed is None)
        scope[PRINCIPAL] = principal
        if needed is not None:
            what = f"{scope['method']} {path[:128]}" if is_http else "a websocket"
            check_scope(principal, needed, what)
        if not is_http or runs_model(scope["method"], path):
            self._rates.take(principal)

    async def _who(self, text: str | None, *, is_open: bool) -> Principal:
        if _is_among(text, self.state.server_keys):
            return SERVER_KEY
        if self.state.keys is None:
            # The server's own check leaves routes out, some of which generate.
            if self.state.server_keys and not is_open:
                raise UnauthenticatedError("expected the server's API key as a bearer token", at=())
            return ANYONE
        return NOBODY if is_open else await self.state.keys.authenticate(text)


def _key_of(headers: Headers) -> str | None:
    """The key that a request brings: in `Authorization: Bearer`, and only without one in `x-api-key`."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key", "").strip() or None


def _is_among(text: str | None, keys: Sequence[str]) -> bool:
    """Compared as digests, all of them, so that time tells neither which nor how long."""
    if text is None:
        return False
    given = hashlib.sha256(text.encode()).digest()
    equal = [hmac.compare_digest(given, hashlib.sha256(key.encode()).digest()) for key in keys]
    return any(equal)


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        reason = str(error).encode()[:_MAX_REASON_BYTES].decode(errors="ignore")
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": reason})
        return
    response = refusal(error, path_of(scope))
    if isinstance(error, UnauthenticatedError):
        response.headers["www-authenticate"] = "Bearer"
    if isinstance(error, RateExceededError):
        response.headers["retry-after"] = str(error.retry_after)
    if isinstance(error, UnavailableError):
        response.headers["retry-after"] = "1"
    await response(scope, receive, send)
