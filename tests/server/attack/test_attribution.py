"""The signed audit log speaks of what a client was given: of a stopped reply, one cut short, and one left."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from tests.server.attack.log import verified
from tests.server.attack.running import Attacked

PROMPT = [0, 17, 41, 5]
LENGTH = 60
BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": PROMPT,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
}


def ask(attacked: Attacked, name: str, **changed: Any) -> dict[str, Any]:
    body = {**BODY, "max_tokens": LENGTH, **changed}
    reply = attacked.server.post("/v1/completions", body, headers={"x-request-id": name})
    assert reply.status_code == 200, reply.text
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


def record(attacked: Attacked, name: str) -> dict[str, Any]:
    """What is on record of a request, once it is."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = [line for line in verified(attacked.audit) if line.get("request_id") == name]
        if found:
            (line,) = found
            return line
        time.sleep(0.2)
    raise AssertionError(f"expected {name} on record")


def told(line: dict[str, Any]) -> Any:
    return line["tokens"], line["watched"]


@pytest.fixture(scope="module")
def tokens(attacked: Attacked) -> list[int]:
    """Of the whole reply; its prompt lies in the cache, so that each request here reads the same of it."""
    found: list[int] = ask(attacked, "attribution-whole")["token_ids"]
    assert len(found) == LENGTH
    return found


def is_new(tokens: list[int], k: int) -> bool:
    return not any(f"w{t}".startswith(f"w{tokens[k]}") for t in tokens[:k])


def test_a_reply_that_a_stop_string_ends_is_on_record_as_one_of_so_many_tokens(
    attacked: Attacked, tokens: list[int]
) -> None:
    stop = next(k for k in range(6, LENGTH) if is_new(tokens, k))
    stopped = ask(attacked, "attribution-stop", stop=[f"w{tokens[stop]}"])
    assert stopped["token_ids"] == tokens[: stop + 1]
    ask(attacked, "attribution-length", max_tokens=stop + 1)
    line = record(attacked, "attribution-stop")
    assert told(line) == told(record(attacked, "attribution-length"))
    assert line["tokens"] == len(PROMPT) + stop
    assert (line["outcome"], line.get("reason")) == ("ok", None)


def test_what_would_have_ended_a_reply_behind_its_stop_did_not(attacked: Attacked, tokens: list[int]) -> None:
    stop = next(k for k in range(6, LENGTH) if is_new(tokens, k))
    feature, bound = _first_above(attacked, stop)
    when = {"sae": "demo", "feature": feature, "above": bound}
    abort = {"then": "abort", "when": when, "where": {"phase": "generation"}}
    steering = {"interventions": [abort]}
    ended = ask(attacked, "attribution-abort", steering=steering)
    assert (ended["finish_reason"], ended["token_ids"]) == ("content_filter", tokens[: stop + 1])
    assert record(attacked, "attribution-abort")["outcome"] == "aborted"
    stopped = ask(attacked, "attribution-before", steering=steering, stop=[f"w{tokens[stop]}"])
    assert (stopped["finish_reason"], stopped["token_ids"]) == ("stop", tokens[: stop + 1])
    assert record(attacked, "attribution-before")["outcome"] == "ok"


def _first_above(attacked: Attacked, stop: int) -> tuple[int, float]:
    """A feature, and a bound that it is above on that token for the first time in the generation."""
    for feature in range(40, 60):
        where = {"phase": "generation", "stop": stop + 1}
        at = {"phase": "generation", "start": stop + 1, "stop": stop + 2}
        before, then = (_largest(attacked, feature, w) for w in (where, at))
        if then > before + 0.1:
            return feature, (before + then) / 2
    raise AssertionError("expected a feature that fires more strongly there than before")


def _largest(attacked: Attacked, feature: int, where: dict[str, Any]) -> float:
    look = {"sae": "demo", "feature": feature, "op": "scale", "value": 1.0, "where": where}
    body = {**BODY, "max_tokens": LENGTH, "steering": {"interventions": [look]}}
    report = attacked.server.post("/v1/completions", body).json()["steering"]
    return float(report["interventions"][0]["before"]["max"])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_of_a_client_that_left_the_tokens_are_on_record_that_were_made_for_it(
    attacked: Attacked, path: str
) -> None:
    name = f"left-{path.rpartition('/')[0].rpartition('/')[2]}"
    prompt: dict[str, Any] = {"prompt": PROMPT}
    if "chat" in path:
        prompt = {"messages": [{"role": "user", "content": "w5 w6"}]}
    body = {**BODY, **prompt, "max_tokens": 400, "stream": True}
    if "chat" in path:
        del body["prompt"]
    received = 0
    with attacked.server.http.stream("POST", path, json=body, headers={"x-request-id": name}) as reply:
        for text in reply.iter_lines():
            received += any(f'"{key}":"w' in text.replace('" w', '"w') for key in ("text", "content"))
            if received >= 5:
                break
    line = record(attacked, name)
    assert (line["outcome"], line.get("reason")) == ("left", None)
    # As many as one reply of that length has: no more, and none that was received is missing.
    again = {**body, "stream": False, "max_tokens": 1}
    first = attacked.server.post(path, again, headers={"x-request-id": f"{name}-1"})
    assert first.status_code == 200
    prompt_tokens = record(attacked, f"{name}-1")["tokens"]
    made = line["tokens"] - prompt_tokens + 1
    assert 5 <= made <= 400
    exactly = {**again, "max_tokens": made}
    attacked.server.post(path, exactly, headers={"x-request-id": f"{name}-again"})
    assert told(line) == told(record(attacked, f"{name}-again"))


def test_a_client_that_leaves_before_its_reply_is_on_record_too(attacked: Attacked) -> None:
    body = {**BODY, "max_tokens": 450}
    with pytest.raises(httpx.ReadTimeout):
        attacked.server.post(
            "/v1/completions", body, headers={"x-request-id": "attribution-left"}, timeout=0.5
        )
    line = record(attacked, "attribution-left")
    assert (line["outcome"], line.get("reason")) == ("left", None)
    made = line["tokens"] - len(PROMPT) + 1
    assert 0 <= made < 450
    if made:
        ask(attacked, "attribution-as-many", max_tokens=made)
        assert told(line) == told(record(attacked, "attribution-as-many"))
