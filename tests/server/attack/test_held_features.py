"""No request gets a held feature back: not one token, in the stream as it is stored behind the hook."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import httpx

from tests.server.attack.hostile import hostile_request
from tests.server.attack.running import Attacked
from tests.support.scale import REST, amount, scaled

REQUESTS = amount(500, 150, "ATTACK_REQUESTS")
AT_ONCE = 12


async def crowd(attacked: Attacked, asked: list[tuple[str, dict[str, Any]]]) -> list[httpx.Response]:
    gate = asyncio.Semaphore(AT_ONCE)
    head = attacked.head("all")
    async with httpx.AsyncClient(base_url=attacked.server.url, headers=head, timeout=240) as client:

        async def one(path: str, body: dict[str, Any]) -> httpx.Response:
            async with gate:
                return await client.post(path, json=body)

        return await asyncio.gather(*(one(path, body) for path, body in asked))


@scaled
def test_no_token_of_hostile_requests_holds_a_held_feature(attacked: Attacked) -> None:
    attacked.observe()
    rng = random.Random(20 + REST)
    asked = [hostile_request(rng) for _ in range(REQUESTS)]
    replies = asyncio.run(crowd(attacked, asked))
    failed = [
        (path, body, r.text[:300])
        for (path, body), r in zip(asked, replies, strict=True)
        if r.status_code >= 500
    ]
    assert not failed, failed[:3]
    seen = attacked.rpc("attack_observed")
    served = Counter(
        path for (path, _), reply in zip(asked, replies, strict=True) if reply.status_code == 200
    )
    assert len(served) == 8
    assert min(served.values()) >= REQUESTS // 40
    # The model does have these features wherever nobody holds them, and the requests were not all refused.
    assert seen["tokens"] > 5 * REQUESTS
    assert seen["fired_before"] > seen["tokens"] // 4
    assert (seen["fired_behind"], seen["exact"], seen["rounded"]) == (0, 0.0, 0.0), seen


def test_the_look_behind_the_hook_would_see_a_held_feature(attacked: Attacked) -> None:
    """The check above is no better than its instrument: an unlucky feature beside the held ones is seen."""
    others = list(range(40, 60))
    attacked.rpc("attack_observe", str(attacked.sae), others, 1)
    attacked.server.post("/v1/completions", {"model": "tiny", "prompt": list(range(5, 40)), "max_tokens": 4})
    seen = attacked.rpc("attack_observed")
    assert seen["fired_behind"] > 0
    assert seen["exact"] > 0
