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


def generated(server: Server) -> float:
    return server.metric("vllm:generation_tokens_total")


def clamp(feature: int) -> dict[str, Any]:
    return {"interventions": [{"feature": feature, "op": "clamp", "value": 9.0}]}


def show_slots(server: Server) -> float:
    """Slots in use just now: a short request's report brings them up to date."""
    body = {"model": "tiny", "prompt": "w5", "max_tokens": 1, "steering": clamp(100)}
    assert server.post("/v1/completions", body).status_code == 200
    return server.metric("steerserve_slots_in_use")


LONG: dict[str, Any] = {"model": "tiny", "max_tokens": 4000, "ignore_eos": True}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "w5"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "w5"}]},
}


@pytest.mark.parametrize("path", ASKED)
def test_a_client_killed_mid_stream_leaves_no_slot_in_use(server: Server, path: str) -> None:
    before = generated(server)
    for feature in range(3):
        body = {**LONG, **ASKED[path], "stream": True, "steering": clamp(feature)}
        with server.http.stream("POST", path, json=body) as reply:
            next(reply.iter_lines())
    assert server.eventually(lambda: show_slots(server) == 0)
    assert server.eventually(lambda: idle(server))
    assert generated(server) - before < 3 * LONG["max_tokens"]


def test_a_stream_holds_its_slot_while_it_lasts(server: Server) -> None:
    seen = []
    for feature in range(5):
        body = {**LONG, "prompt": "w5", "stream": True, "steering": clamp(feature)}
        with server.http.stream("POST", "/v1/completions", json=body) as reply:
            # Kept, because dropping it would close the connection.
            lines = reply.iter_lines()
            next(lines)
            seen.append(show_slots(server))
    assert max(seen) >= 1
    assert server.eventually(lambda: show_slots(server) == 0)


def test_a_client_that_leaves_before_the_reply_leaves_no_slot_in_use(server: Server) -> None:
    before = generated(server)
    with pytest.raises(httpx.ReadTimeout):
        server.post("/v1/completions", {**LONG, "prompt": "w5", "steering": clamp(1)}, timeout=0.3)
    assert server.eventually(lambda: show_slots(server) == 0)
    assert generated(server) - before < LONG["max_tokens"]


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
        limits = httpx.Limits(max_connections=2 * AT_ONCE, max_keepalive_connections=0)
        head = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server.url, headers=head, timeout=120, limits=limits) as client:
            return list(await asyncio.gather(*(one(client, gate, seed) for seed in range(MANY))))

    ended = asyncio.run(crowd())
    assert ended.count("served") > 0.85 * MANY
    assert server.eventually(lambda: show_slots(server) == 0)
    assert server.eventually(lambda: idle(server))
