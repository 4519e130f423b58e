"""Clients that never finish what they begin cost the others nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import pytest

from tests.server.attack.running import Attacked

HALF_OPEN = 50
BODY = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 2}


@contextmanager
def half_open(attacked: Attacked, sent: bytes) -> Iterator[list[socket.socket]]:
    place = urlsplit(attacked.server.url)
    with ExitStack() as stack:
        found = []
        for _ in range(HALF_OPEN):
            connection = socket.create_connection((place.hostname, place.port), timeout=60)
            found.append(stack.enter_context(connection))
            connection.sendall(sent)
        yield found


def _head(attacked: Attacked) -> bytes:
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {attacked.keys['user']}\r\n"
    ).encode()


@pytest.mark.parametrize("what", ["nothing", "half a head", "half a body", "half a chunk", "an endless body"])
def test_half_open_connections_hold_up_nobody(attacked: Attacked, what: str) -> None:
    sent = {
        "nothing": b"",
        "half a head": _head(attacked),
        "half a body": _head(attacked) + b'Content-Length: 900\r\n\r\n{"steering": {"interventions": [',
        "half a chunk": _head(attacked) + b'Transfer-Encoding: chunked\r\n\r\nff\r\n{"steering',
        "an endless body": _head(attacked) + b"Content-Length: 99999999999\r\n\r\n" + b"[" * 4096,
    }[what]
    with half_open(attacked, sent) as connections:
        for _ in range(3):
            reply = attacked.server.post("/v1/completions", {**BODY, "steering": {"interventions": []}})
            assert reply.status_code == 200, reply.text
            for connection in connections:
                connection.sendall(b" " if "body" in what else b"")
        assert attacked.server.http.get("/v1/steering/health").json()["status"] == "ok"
    assert attacked.server.post("/v1/completions", BODY).status_code == 200
