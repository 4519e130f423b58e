"""HTTP by hand, for what a client library would set right before it is sent."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Answer", "ask"]

_SECONDS = 60


@dataclass(frozen=True)
class Answer:
    """A reply's status and body."""

    status: int
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error object of the body."""
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


def ask(url: str, method: str, target: str, headers: list[str], body: bytes = b"") -> Answer:
    """One request, its target and headers byte for byte; a `Host` is added where none is given."""
    place = urlsplit(url)
    if not any(line.lower().startswith("host:") for line in headers):
        headers = [f"Host: {place.netloc}", *headers]
    lines = [f"{method} {target} HTTP/1.1", *headers, f"Content-Length: {len(body)}", "Connection: close"]
    with socket.create_connection((place.hostname, place.port), timeout=_SECONDS) as connection:
        connection.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
        found = b""
        while part := connection.recv(65536):
            found += part
    head, _, content = found.partition(b"\r\n\r\n")
    return Answer(int(head.split(b" ", 2)[1]), content)
