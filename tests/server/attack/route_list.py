"""Lists the routes of the app from inside of the server, for its OpenAPI document leaves some out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

PATH = "/list-of-routes"


async def answer(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
    """For `--middleware`: a page of (path, methods) of every route, mounted ones included."""
    if request.url.path != PATH:
        return await go_on(request)
    return JSONResponse(walk(request.app.routes))


def walk(routes: Iterable[BaseRoute], before: str = "") -> list[Any]:
    """Every route as [path, kind, methods]; a mounted app that has none of its own is one itself."""
    found: list[Any] = []
    for route in routes:
        path = before + str(getattr(route, "path", ""))
        inner = getattr(route, "routes", None) or []
        found += walk(inner, path)
        if not inner:
            methods = sorted(getattr(route, "methods", None) or [])
            found.append([path, type(route).__name__, methods])
    return found
