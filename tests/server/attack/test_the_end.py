"""The server is killed under load: no reply that a client has whole is missing from the log."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import httpx

from steerserve.audit import AuditLog
from tests.server.attack.log import verified
from tests.server.attack.running import Attacked

REQUESTS = 400
FINISHED = 60
BODY: dict[str, Any] = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 3}


async def load(attacked: Attacked) -> list[str]:
    """Ask until the server is gone. Returns: the ids of the requests whose replies came whole."""
    finished: list[str] = []
    gate = asyncio.Semaphore(8)
    async with httpx.AsyncClient(base_url=attacked.server.url, timeout=240) as client:

        async def one(number: int) -> None:
            name, streams = f"end-{number}", number % 2 == 1
            head = attacked.head("user") | {"x-request-id": name}
            body = {**BODY, "stream": streams, "steering": {"interventions": [], "report": number % 3 == 0}}
            async with gate:
                if attacked.killed:
                    return
                try:
                    reply = await client.post("/v1/completions", json=body, headers=head)
                except httpx.TransportError:
                    return
            if reply.status_code == 200 and (not streams or reply.text.endswith("data: [DONE]\n\n")):
                finished.append(name)
            if len(finished) == FINISHED and not attacked.killed:
                attacked.killed = True
                os.killpg(attacked.server.process.pid, signal.SIGKILL)

        await asyncio.gather(*(one(number) for number in range(REQUESTS)))
    return finished


def test_a_killed_server_has_every_finished_reply_on_record(attacked: Attacked) -> None:
    finished = asyncio.run(load(attacked))
    assert len(finished) >= FINISHED
    attacked.server.process.wait()
    records = [line for line in verified(attacked.audit) if line["event"] == "request"]
    missing = set(finished) - {line["request_id"] for line in records if line["outcome"] == "ok"}
    assert not missing, missing
    # Whoever goes on with the log finds an end that a crash leaves, and not one that somebody changed.
    AuditLog(attacked.audit, "audit-0").close()
    again = [line for line in verified(attacked.audit) if line["event"] != "head"]
    assert {line["request_id"] for line in again} >= set(finished)
    assert [line["event"] for line in again][-2:] == ["start", "stop"]
