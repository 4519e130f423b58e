"""Reports speak of the reply's own tokens, whatever the engine computed behind them; HF counts them again."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import httpx
import pytest
from torch import Tensor

from tests.server.conftest import KEY, LAYER, Server
from tests.support.reference import Reference, touches

FEATURES = (3, 5, 7, 9)
GENERATION = {"phase": "generation"}
PROMPT = [0, 17, 41, 5]
LENGTH = 40
AT_ONCE = 80


def looking(feature: int) -> dict[str, Any]:
    return {"sae": "demo", "feature": feature, "op": "scale", "value": 1.0, "where": GENERATION}


LOOK = {"interventions": [looking(feature) for feature in FEATURES]}


@functools.cache
def reference_of(server: Server) -> Reference:
    folder = server.log.parent
    return Reference(folder / "model", {"demo": (folder / "sae", LAYER + 1)})


def body(prompt: list[int] = PROMPT, **changed: Any) -> dict[str, Any]:
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
    return asked | {"return_token_ids": True, "steering": LOOK} | changed


def whole(server: Server, prompt: list[int] = PROMPT) -> list[int]:
    """The tokens of the reply to a prompt that nothing stops."""
    reply = server.post("/v1/completions", body(prompt, steering={"interventions": []})).json()
    tokens: list[int] = reply["choices"][0]["token_ids"]
    assert len(tokens) == LENGTH
    return tokens


def first_seen(tokens: list[int], least: int) -> int:
    """A token that is new in the text, from some place on; its text is no part of any before it."""
    return next(
        k
        for k in range(least, len(tokens))
        if not any(f"w{t}".startswith(f"w{tokens[k]}") for t in tokens[:k])
    )


def activations(server: Server, prompt: list[int], tokens: list[int], feature: int) -> Tensor:
    """Where a reply's tokens were sampled, by HF."""
    ids = prompt + tokens
    found = reference_of(server).activations(ids, len(prompt), "demo", feature)
    where = [
        position
        for position in range(len(ids) - 1)
        if touches(looking(feature), position, ids, len(prompt), frozenset({0, 1, 2}))
    ]
    return found[where]


def check(server: Server, report: dict[str, Any], prompt: list[int], replies: list[list[int]]) -> None:
    """Hold a report to the tokens of the replies that it is of."""
    assert "incomplete" not in report, report
    for entry in report["interventions"]:
        f = [activations(server, prompt, tokens, entry["feature"]) for tokens in replies]
        counted = sum(len(one) for one in f)
        assert entry["tokens"] == counted, (entry, [len(tokens) for tokens in replies])
        mean = sum(float(one.sum()) for one in f) / counted
        assert entry["before"]["mean"] == pytest.approx(mean, rel=1e-3, abs=1e-5)
        assert entry["before"]["max"] == pytest.approx(max(float(one.max()) for one in f), rel=1e-3, abs=1e-5)


def test_a_stop_string_ends_what_is_counted(server: Server) -> None:
    tokens = whole(server)
    stop = first_seen(tokens, 6)
    reply = server.post("/v1/completions", body(stop=[f"w{tokens[stop]}"])).json()
    choice = reply["choices"][0]
    assert (choice["finish_reason"], choice["token_ids"]) == ("stop", tokens[: stop + 1])
    check(server, reply["steering"], PROMPT, [tokens[: stop + 1]])


def test_max_tokens_and_a_stop_token_end_what_is_counted(server: Server) -> None:
    tokens = whole(server)
    stop = first_seen(tokens, 6)
    for ends in ({"max_tokens": stop + 1}, {"stop_token_ids": [tokens[stop]]}):
        reply = server.post("/v1/completions", body(**ends)).json()
        assert reply["choices"][0]["token_ids"] == tokens[: stop + 1]
        check(server, reply["steering"], PROMPT, [tokens[: stop + 1]])


def test_samples_of_one_prompt_end_each_for_itself(server: Server) -> None:
    # Every token from 100 on has such a text, so that no two samples are likely to end at the same place.
    asked = body(n=3, temperature=1.0, seed=5, stop=["w1", "w2"], min_tokens=3)
    reply = server.post("/v1/completions", asked).json()
    replies = [choice["token_ids"] for choice in reply["choices"]]
    assert [choice["finish_reason"] for choice in reply["choices"]] == ["stop"] * 3
    assert reply["steering"]["requests"] == 3
    check(server, reply["steering"], PROMPT, replies)


def test_a_condition_that_holds_behind_the_stop_ended_nothing(server: Server) -> None:
    tokens = whole(server)
    stop = first_seen(tokens, 6)
    # Of the position that is computed once the stop string has come, and of none before it.
    feature, threshold = behind(server, tokens, stop)
    abort = {"then": "abort", "when": {"sae": "demo", "feature": feature, "above": threshold}}
    abort |= {"where": GENERATION}
    steering = {"interventions": [abort, *LOOK["interventions"]]}
    ended = server.post("/v1/completions", body(steering=steering)).json()
    assert ended["choices"][0]["finish_reason"] == "content_filter"
    assert ended["choices"][0]["token_ids"] == tokens[: stop + 1]
    first, *rest = ended["steering"]["interventions"]
    assert first["aborted_at"] == len(PROMPT) + stop
    # The position that ended it is counted too: all but the token that followed is what the client has.
    assert [entry["tokens"] for entry in rest] == [stop + 2] * len(rest)
    reply = server.post("/v1/completions", body(steering=steering, stop=[f"w{tokens[stop]}"])).json()
    assert reply["choices"][0]["finish_reason"] == "stop"
    first, *_ = reply["steering"]["interventions"]
    assert first["aborted_at"] is None
    check(server, {"interventions": reply["steering"]["interventions"][1:]}, PROMPT, [tokens[: stop + 1]])


def behind(server: Server, tokens: list[int], stop: int) -> tuple[int, float]:
    """A feature and a bound that it is above for the first time on the stop token itself."""
    for feature in range(128):
        f = activations(server, PROMPT, tokens[: stop + 2], feature)
        if float(f[stop + 1]) > float(f[: stop + 1].max()) + 0.05:
            return feature, float(f[stop + 1] + f[: stop + 1].max()) / 2
    raise AssertionError("expected a feature that fires more strongly there than before")


def test_a_crowd_with_stop_strings_is_counted_exactly(server: Server) -> None:
    prompts = [[0, 3 + n, 5 + 2 * n, 7] for n in range(AT_ONCE)]

    async def crowd() -> list[dict[str, Any]]:
        head = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server.url, headers=head, timeout=240) as client:

            async def ask(prompt: list[int], **changed: Any) -> dict[str, Any]:
                reply = await client.post("/v1/completions", json=body(prompt, **changed))
                assert reply.status_code == 200, reply.text
                found: dict[str, Any] = reply.json()
                return found

            first = await asyncio.gather(*(ask(p, steering={"interventions": []}) for p in prompts))
            tokens = [one["choices"][0]["token_ids"] for one in first]
            stops = [f"w{t[first_seen(t, 4 + n % 20)]}" for n, t in enumerate(tokens)]
            pairs = zip(prompts, stops, strict=True)
            return list(await asyncio.gather(*(ask(p, stop=[s]) for p, s in pairs)))

    for prompt, reply in zip(prompts, asyncio.run(crowd()), strict=True):
        choice = reply["choices"][0]
        assert choice["finish_reason"] == "stop"
        check(server, reply["steering"], prompt, [choice["token_ids"]])
