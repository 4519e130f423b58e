"""A catalog without files, and an app that answers like vLLM's routes without an engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from steerserve.carried import CARRIED, Carried
from steerserve.catalog import Catalog, Source
from steerserve.errors import RequestError
from steerserve.hookpoint import HookPoint
from steerserve.policy.enforcement import Merged
from steerserve.report import Reporter
from steerserve.sae import Sae
from steerserve.server.collector import ReportCollector
from steerserve.server.middleware import SteeringMiddleware
from steerserve.server.state import SteeringState

NO_WEIGHTS = cast(Sae, None)
STEERING = {"interventions": [{"feature": 5, "op": "clamp", "value": 2.0}]}


@pytest.fixture
def catalog() -> Catalog:
    labels = {"legal": (7,), "twice": (8, 9)}
    sae = Source("sae:demo", "demo", HookPoint(2), 128, "f", NO_WEIGHTS, labels)
    french = Source("direction:french", "french", HookPoint(2), 1, "g", NO_WEIGHTS)
    return Catalog({sae.key: sae, french.key: french}, 4, 64, frozenset({0}), 4)


@dataclass
class Engine:
    """Stands for vLLM behind the middleware: what it saw, and whether it admits."""

    admits: bool = True
    seen: list[Carried | None] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    asked: list[dict[str, dict[str, int]]] = field(default_factory=list)
    since: int = -1

    def take(self, body: bytes) -> None:
        carried = CARRIED.get()
        self.seen.append(carried)
        self.bodies.append(body)
        if carried is not None and self.admits:
            self.admit(carried)

    def admit(self, carried: Carried) -> None:
        """As admission does: a request is admitted with a plan, or refused, or is not its business."""
        try:
            own, known = carried.own, carried.in_force
            merged = Merged(own) if known is None else known.merge(own, carried.caller)
        except RequestError as error:
            carried.refused = error
            return
        if merged.plan is not None:
            carried.merged = merged
            carried.admitted += 1

    async def collect(self, tickets: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
        self.asked.append(tickets)
        # From the cache, since, tokens, sums and maxima before and after, fired, lowered.
        row = [1, self.since, 4, 2.0, 1.0, 8.0, 2.0, 4, 0]
        return [
            {
                "tallies": {ticket: [[row] * 4] for ticket in tickets},
                "requests": dict.fromkeys(tickets, 1),
                "inexact": [],
                "tokens": [["sae:demo", "clamp", 4 * len(tickets)]],
                "slots": {"in_use": 0, "capacity": 8},
            }
        ]


def event(data: object, name: str | None = None) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


CHUNK = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [{"text": "a"}]}


def make_app(engine: Engine, chunks: list[bytes] | None = None) -> Starlette:
    """POST routes that admit; one of them streams `chunks`, and is admitted before the second."""

    async def plain(request: Request) -> Response:
        engine.take(await request.body())
        return JSONResponse({"id": "x", "choices": []})

    async def failing(request: Request) -> Response:
        engine.take(await request.body())
        return JSONResponse({"error": {"message": "no"}}, status_code=404)

    async def stream(request: Request) -> Response:
        body = await request.body()

        async def produce() -> AsyncIterator[bytes]:
            for index, chunk in enumerate(chunks or []):
                if index == 1:
                    engine.take(body)
                yield chunk

        return StreamingResponse(produce(), media_type="text/event-stream")

    routes = [
        Route("/v1/completions", plain, methods=["POST"]),
        Route("/v1/messages", plain, methods=["POST"]),
        Route("/v1/embeddings", plain, methods=["POST"]),
        Route("/v1/responses", failing, methods=["POST"]),
        Route("/v1/chat/completions", stream, methods=["POST"]),
    ]
    return Starlette(routes=routes)


Client = Callable[..., httpx.Response]


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def state(catalog: Catalog, engine: Engine) -> SteeringState:
    return SteeringState(
        catalog, ReportCollector(engine.collect), Reporter(catalog), model="m", vllm_version="0"
    )


@pytest.fixture
def post(engine: Engine, state: SteeringState) -> Client:
    """`post("/v1/completions", {...})`; bytes are sent as they are."""

    def send(path: str, body: Any, *, chunks: list[bytes] | None = None, **headers: str) -> httpx.Response:
        app = SteeringMiddleware(make_app(engine, chunks), state)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}

        async def go() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
                return await client.post(path, content=content, headers=head)

        return asyncio.run(go())

    return send
