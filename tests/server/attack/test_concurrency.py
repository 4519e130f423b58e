"""Policies that change under load: one request meets one version of each, in all of its parts."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.server.attack.log import verified
from tests.server.attack.running import Attacked, policy

REQUESTS = int(os.environ.get("ATTACK_CHURN", "40"))
PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [12]]
GENERATED = 4
# Drowns whatever the prompt says, so that every sample shows which version it was made under.
DROWN = {"direction": "french", "op": "clamp", "value": 1e6}
NOTHING = {"direction": "french", "op": "add", "value": 0}
# top_k 1 is the best token, and may be asked for several times.
BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": PROMPTS,
    "n": 4,
    "max_tokens": GENERATED,
    "top_k": 1,
    "steering": {"interventions": []},
}


def document(name: str, version: int) -> str:
    """An even version drowns the stream."""
    return policy(name, version, interventions=[NOTHING if version % 2 else DROWN])


@pytest.fixture(scope="module")
def drowned(attacked: Attacked) -> str:
    """What every prompt continues with under an even version."""
    head = {"content-type": "application/yaml"}
    put = attacked.server.http.put("/v1/steering/policies/tide", content=document("tide", 2), headers=head)
    assert put.status_code == 201, put.text
    texts = {choice["text"] for choice in attacked.server.post("/v1/completions", BODY).json()["choices"]}
    _delete(attacked)
    assert len(texts) == 1
    return texts.pop()


def _delete(attacked: Attacked) -> None:
    reply = attacked.server.http.delete("/v1/steering/policies/tide", headers={"if-match": "*"})
    assert reply.status_code in (200, 404), reply.text


async def over_http(attacked: Attacked, until: Callable[[], bool]) -> list[int]:
    """Put, put again and delete one policy, each by the ETag that came before."""
    statuses: list[int] = []
    exists = False
    head = attacked.head("admin") | {"content-type": "application/yaml"}
    async with httpx.AsyncClient(base_url=attacked.server.url, headers=head, timeout=120) as client:
        where = "/v1/steering/policies/tide"
        for version in itertools.count(1):
            if until():
                break
            match = {"if-none-match": "*"} if version == 1 or version % 5 == 1 else {"if-match": "*"}
            reply = await client.put(where, content=document("tide", version), headers=match)
            statuses.append(reply.status_code)
            exists = exists or reply.status_code in (200, 201)
            await asyncio.sleep(0.05)
            if version % 5 == 0:
                gone = (await client.delete(where, headers={"if-match": "*"})).status_code
                if exists:
                    statuses.append(gone)
                else:  # every change since the last deletion met a folder that could not be read
                    assert gone in (404, 412, 503), gone
                exists = exists and gone != 200
    return statuses


async def by_hand(attacked: Attacked, until: Callable[[], bool]) -> None:
    """Rename new content over another policy's file, some of it damaged."""
    rng = random.Random(1)
    for version in itertools.count(1):
        if until():
            break
        text = policy("edited", version, interventions=[{"sae": "late", "feature": 9, "op": "ablate"}])
        new = attacked.policies / ".edited.yaml.new"
        new.write_text(text if rng.random() < 0.8 else text[: rng.randrange(len(text))])
        os.replace(new, attacked.policies / "edited.yaml")
        await asyncio.sleep(0.3)
    (attacked.policies / "edited.yaml").unlink()


async def load(attacked: Attacked, replies: list[httpx.Response]) -> None:
    gate = asyncio.Semaphore(4)
    async with httpx.AsyncClient(base_url=attacked.server.url, timeout=240) as client:

        async def one(number: int) -> None:
            head = attacked.head("user") | {"x-request-id": f"churn-{number}"}
            async with gate:
                replies.append(await client.post("/v1/completions", json=BODY, headers=head))

        await asyncio.gather(*(one(number) for number in range(REQUESTS)))


async def storm(attacked: Attacked) -> tuple[list[httpx.Response], list[int]]:
    replies: list[httpx.Response] = []

    def is_over() -> bool:
        return len(replies) == REQUESTS

    statuses, _, _ = await asyncio.gather(
        over_http(attacked, is_over), by_hand(attacked, is_over), load(attacked, replies)
    )
    return replies, statuses


def test_no_request_is_served_under_two_versions_of_a_policy(attacked: Attacked, drowned: str) -> None:
    replies, statuses = asyncio.run(storm(attacked))
    _delete(attacked)
    assert {201, 200} <= set(statuses) <= {200, 201, 400, 412, 503}, statuses
    seen: set[int | None] = set()
    for reply in replies:
        assert reply.status_code == 200, reply.text
        found = reply.json()
        named = [entry["name"] for entry in found["steering"]["policies"]]
        assert len(named) == len(set(named)), named
        assert {"hold", "churn", "look"} <= set(named)
        versions = {entry["name"]: entry["version"] for entry in found["steering"]["policies"]}
        version = versions.get("tide")
        seen.add(version)
        assert found["steering"]["requests"] == len(PROMPTS) * 4
        texts = [choice["text"] for choice in found["choices"]]
        expected = version is not None and version % 2 == 0
        assert [text == drowned for text in texts] == [expected] * 12, (version, texts)
    assert len(seen) > 2
    _is_on_record(attacked, replies)


def _is_on_record(attacked: Attacked, replies: list[httpx.Response]) -> None:
    """Each with the versions that its report names."""
    records = {line["request_id"]: line for line in verified(attacked.audit) if line["event"] == "request"}
    for number, reply in enumerate(
        sorted(replies, key=lambda r: int(r.headers["x-request-id"].rpartition("-")[2]))
    ):
        line = records[f"churn-{number}"]
        said = {(entry["name"], entry["version"]) for entry in reply.json()["steering"]["policies"]}
        assert {(entry["name"], entry["version"]) for entry in line["policies"]} == said
        assert (line["outcome"], line["principal"], line["model"]) == ("ok", "user", "tiny")


def test_every_change_over_http_is_on_record(attacked: Attacked) -> None:
    records = [line for line in verified(attacked.audit) if line["event"] == "policy" and line["principal"]]
    assert {"created", "replaced", "deleted"} <= {line["detail"].split()[0] for line in records}
    assert {line["principal"] for line in records} == {"admin", "all"}


def test_a_policy_limited_to_names_that_nothing_has_is_told_everywhere(attacked: Attacked) -> None:
    limits = {"models": ["tiny", "tyny"], "scopes": ["key:user", "key:usr"]}
    text = policy("tide", 1, applies=limits, interventions=[NOTHING])
    http, where = attacked.server.http, "/v1/steering/policies/tide"
    put = http.put(where, content=text, headers={"content-type": "application/yaml"})
    try:
        assert put.json()["missing"] == ["key:usr", "tyny"]
        assert http.get(where).json()["missing"] == ["key:usr", "tyny"]
        health = http.get("/v1/steering/health").json()
        assert health["status"] == "ok"
        assert health["warnings"] == {"tide": "nothing is called key:usr, tyny"}
    finally:
        _delete(attacked)
    assert http.get("/v1/steering/health").json()["warnings"] == {}
