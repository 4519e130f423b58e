"""Clients that leave, and crowds: nothing of theirs stays behind."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import pytest

from tests.server.conftest import KEY, Server

MANY = 1000
AT_ONCE = 64


def idle(server: Server) -> bool:
    return server.metric("steerserve_slots_in_use") == 0 and server.metric("vllm:num_requests_running") == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_killed_mid_stream_leaves_no_slot_in_use(server: Server, path: str) -> None:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 450, "n": 8, "ignore_eos": True, "stream": True}
    body |= (
        {"prompt": "w5"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "w5"}]}
    )
    before = server.metric("vllm:request_success_total", finished_reason="abort")
    for feature in range(4):
        steering = {"interventions": [{"feature": feature, "op": "clamp", "value": 9.0}]}
        with server.http.stream("POST", path, json={**body, "steering": steering}) as reply:
            next(reply.iter_lines())
    assert server.eventually(lambda: idle(server))
    assert server.metric("vllm:request_success_total", finished_reason="abort") > before


def test_a_client_that_leaves_before_the_reply_leaves_no_slot_in_use(server: Server) -> None:
    steering = {"interventions": [{"feature": 1, "op": "add", "value": 3.0}]}
    body = {"model": "tiny", "prompt": "w5", "max_tokens": 450, "ignore_eos": True, "steering": steering}
    with pytest.raises(httpx.ReadTimeout):
        server.post("/v1/completions", body, timeout=0.2)
    assert server.eventually(lambda: idle(server))


def plan(rng: random.Random) -> dict[str, Any]:
    """A random plan that is valid."""
    interventions: list[dict[str, Any]] = []
    for feature in rng.sample(range(128), rng.randint(1, 8)):
        op = rng.choice(["clamp", "ablate", "scale", "add", "at_least", "at_most"])
        change: dict[str, Any] = {"feature": feature, "op": op}
        if op != "ablate":
            change["value"] = round(rng.uniform(0, 5), 3)
        change["where"] = rng.choice(
            [{}, {"phase": "prompt"}, {"phase": "generation"}, {"positions": [0, -1]}, {"tokens": [5, 6]}]
        )
        if rng.random() < 0.3:
            change["when"] = {"feature": rng.randrange(128), "above": 0.1}
        interventions.append(change)
    return {"interventions": interventions, "report": rng.random() < 0.7}


async def one(client: httpx.AsyncClient, gate: asyncio.Semaphore, seed: int) -> str:
    """One short request in a hundred ways; says how it ended."""
    rng = random.Random(seed)
    prompt = [rng.randrange(3, 320) for _ in range(rng.randint(1, 20))]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": rng.randint(1, 6), "n": rng.choice([1, 1, 2])}
    body |= {"stream": rng.random() < 0.4, "steering": plan(rng)}
    async with gate:
        if rng.random() < 0.1:
            try:
                await client.post("/v1/completions", json=body, timeout=rng.uniform(0.005, 0.05))
            except httpx.TimeoutException:
                return "left"
        reply = await client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    assert ('"steering"' in reply.text) == body["steering"]["report"]
    assert "incomplete" not in reply.text
    return "served"


@pytest.mark.slow
def test_a_thousand_short_requests_with_random_plans_leave_no_slot_in_use(server: Server) -> None:
    async def crowd() -> list[str]:
        gate = asyncio.Semaphore(AT_ONCE)
        limits = httpx.Limits(max_connections=2 * AT_ONCE)
        head = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server.url, headers=head, timeout=120, limits=limits) as client:
            return list(await asyncio.gather(*(one(client, gate, seed) for seed in range(MANY))))

    ended = asyncio.run(crowd())
    assert ended.count("served") > 0.85 * MANY
    assert server.eventually(lambda: idle(server))
