"""Every POST route of this vLLM, and every way to say `steering`: understood, or refused; never lost."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from steerserve.server.routing import CARRYING
from tests.server.attack.route_list import PATH
from tests.server.attack.running import HELD, Attacked

MESSAGES = [{"role": "user", "content": "w5 w6 w7"}]
PROMPT = [5, 6, 7]
# Nobody may: whoever understands it refuses it, so that a reply of 200 means that it was not read.
FORBIDDEN = {"interventions": [{"sae": "demo", "feature": HELD[0], "op": "add", "value": 5.0}]}
ALLOWED = {"interventions": [{"sae": "demo", "feature": n, "op": "clamp", "value": 30.0} for n in range(4)]}
# What a route wants beside the model; routes that are not here get all of it at once.
BODIES: dict[str, dict[str, Any]] = {
    "/generative_scoring": {"query": [5, 6], "items": [[7], [8]], "label_token_ids": [9, 10]},
    "/inference/v1/generate": {"token_ids": PROMPT, "sampling_params": {"max_tokens": 4, "temperature": 0}},
    "/invocations": {"prompt": PROMPT, "max_tokens": 4, "temperature": 0},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4, "temperature": 0},
    "/v1/chat/completions/batch": {"messages": [MESSAGES, MESSAGES], "max_tokens": 4, "temperature": 0},
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 4, "temperature": 0},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4, "temperature": 0},
    "/v1/responses": {"input": "w5 w6 w7", "max_output_tokens": 4, "temperature": 0},
}
READ_XARGS = (
    "/invocations",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
)
Form = Callable[[dict[str, Any]], dict[str, Any]]


def as_json(body: object, **more: Any) -> dict[str, Any]:
    return {"content": json.dumps(body).encode(), "headers": {"content-type": "application/json"}, **more}


def raw(content: bytes, **headers: str) -> dict[str, Any]:
    return {"content": content, "headers": {"content-type": "application/json", **headers}}


def twice(body: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(FORBIDDEN)
    return raw(f'{json.dumps(body)[:-1]}, "steering": {text}, "steering": {text}}}'.encode())


def escaped(body: dict[str, Any]) -> dict[str, Any]:
    return raw(
        json.dumps({**body, "steering": FORBIDDEN}).replace('"steering"', '"\\u0073teerin\\u0067"').encode()
    )


def in_a_message(body: dict[str, Any]) -> dict[str, Any]:
    return as_json({**body, "messages": [{**MESSAGES[0], "steering": FORBIDDEN}]})


def gzipped(body: dict[str, Any]) -> dict[str, Any]:
    content = gzip.compress(json.dumps({**body, "steering": FORBIDDEN}).encode())
    return raw(content, **{"content-encoding": "gzip"})


FORMS: dict[str, Form] = {
    "object": lambda body: as_json({**body, "steering": FORBIDDEN}),
    "text": lambda body: as_json({**body, "steering": json.dumps(FORBIDDEN)}),
    "list": lambda body: as_json({**body, "steering": [FORBIDDEN]}),
    "null": lambda body: as_json({**body, "steering": None}),
    "twice": twice,
    "escaped": escaped,
    "utf-16": lambda body: raw(json.dumps({**body, "steering": FORBIDDEN}).encode("utf-16")),
    "utf-8 with a mark": lambda body: raw(json.dumps({**body, "steering": FORBIDDEN}).encode("utf-8-sig")),
    "text in vllm_xargs": lambda body: as_json({**body, "vllm_xargs": {"steering": json.dumps(FORBIDDEN)}}),
    "object in vllm_xargs": lambda body: as_json({**body, "vllm_xargs": {"steering": FORBIDDEN}}),
    "extra_args": lambda body: as_json({**body, "extra_args": {"steering": FORBIDDEN}}),
    "extra_body": lambda body: as_json({**body, "extra_body": {"steering": FORBIDDEN}}),
    "sampling_params": lambda body: as_json({**body, "sampling_params": {"steering": FORBIDDEN}}),
    "extra_args of sampling_params": lambda body: as_json(
        {**body, "sampling_params": {"max_tokens": 4, "extra_args": {"steering": FORBIDDEN}}}
    ),
    "in a message": in_a_message,
    "form field": lambda body: {
        "files": {"steering": (None, json.dumps(FORBIDDEN)), "model": (None, "tiny")}
    },
    "form": lambda body: {"data": {"steering": json.dumps(FORBIDDEN), "model": "tiny"}},
    "query": lambda body: as_json(body, params={"steering": json.dumps(FORBIDDEN)}),
    "header": lambda body: raw(json.dumps(body).encode(), steering=json.dumps(FORBIDDEN)),
    "gzip": gzipped,
}


@pytest.fixture(scope="module")
def post_routes(attacked: Attacked) -> list[str]:
    """Every path that the running app takes a POST on, however it was registered."""
    listed = attacked.server.http.get(PATH).json()
    assert len(listed) > 40, listed
    return sorted({path for path, kind, methods in listed if "POST" in methods or kind in ("Mount", "Host")})


def filled(path: str) -> str:
    return path.replace("{response_id}", "resp_1").replace("{path:path}", "x").replace("{name}", "hold")


def body_of(path: str) -> dict[str, Any]:
    everything = {"prompt": "w5", "messages": MESSAGES, "input": "w5", "tokens": PROMPT, "max_tokens": 1}
    return {"model": "tiny", **BODIES.get(path, everything)}


def check_refusal(reply: httpx.Response, said: object) -> None:
    assert 400 <= reply.status_code < 500, (said, reply.status_code, reply.text[:400])
    error = reply.json()["error"]
    assert isinstance(error["message"], str), (said, reply.text[:400])
    assert error["message"], said
    assert isinstance(error["type"], str), said


def test_the_walk_finds_every_route_that_is_known_to_generate(post_routes: list[str]) -> None:
    assert set(BODIES) <= set(post_routes)
    # This model answers no structured questions.
    assert set(post_routes) & set(CARRYING) == {*BODIES, "/v1/systemone"}
    # Those that OpenAPI leaves out, or that only a development server has.
    assert {"/collective_rpc", "/v1/chat/completions/render", "/tokenize"} <= set(post_routes)


@pytest.mark.parametrize("form", FORMS)
def test_steering_that_a_policy_forbids_is_refused_in_every_form_on_every_route(
    attacked: Attacked, post_routes: list[str], form: str
) -> None:
    for path in post_routes:
        reply = attacked.server.http.post(filled(path), **FORMS[form](body_of(path)))
        if form == "text in vllm_xargs" and path.endswith("/render") and reply.status_code == 200:
            # Nothing is generated here: it goes on, whole, to where it is refused.
            assert "steering" in reply.text, path
            continue
        check_refusal(reply, (form, path))


@pytest.mark.parametrize("path", BODIES)
def test_a_policy_forbids_what_touches_a_held_feature_by_its_name(attacked: Attacked, path: str) -> None:
    for feature in (HELD[0], "legal"):
        change = {"sae": "demo", "feature": feature, "op": "clamp", "value": 1.0}
        reply = attacked.server.post(path, {**body_of(path), "steering": {"interventions": [change]}})
        error = reply.json()["error"]
        assert (reply.status_code, error["type"], error["code"]) == (403, "policy_conflict", 403), reply.text
        assert error["param"] == "$.steering.interventions[0]"
        assert "policy `hold`" in error["message"]


@pytest.mark.parametrize("path", BODIES)
def test_what_is_allowed_is_reported_with_the_policies_on_every_route(attacked: Attacked, path: str) -> None:
    reply = attacked.server.post(path, {**body_of(path), "steering": ALLOWED})
    assert reply.status_code == 200, reply.text
    report = reply.json()["steering"]
    assert {"hold", "churn", "look"} == {entry["name"] for entry in report["policies"]}
    assert all(entry["tokens"] > 0 for entry in report["interventions"])
    assert "incomplete" not in report


@pytest.mark.parametrize("path", READ_XARGS)
def test_what_is_allowed_in_vllm_xargs_has_the_effect_of_the_field(attacked: Attacked, path: str) -> None:
    def said(**more: Any) -> str:
        reply = attacked.server.post(path, {**body_of(path), **more})
        assert reply.status_code == 200, reply.text
        found = reply.json()
        return json.dumps(found.get("choices", found.get("output", found.get("content"))), sort_keys=True)

    def words(text: str) -> list[str]:
        return [part for part in text.replace('"', " ").split() if part.startswith("w")]

    by_field = words(said(steering={**ALLOWED, "report": False}))
    assert words(said(vllm_xargs={"steering": json.dumps(ALLOWED)})) == by_field
    assert words(said()) != by_field


def test_bodies_at_the_edge_of_what_can_be_nested_are_answered(attacked: Attacked) -> None:
    start = json.dumps({**body_of("/v1/completions"), "steering": ALLOWED})[:-1]
    for depth in [*range(1, 60, 20), *range(880, 1010)]:
        content = f'{start}, "user": {"[" * depth}{"]" * depth}}}'.encode()
        reply = attacked.server.http.post("/v1/completions", **raw(content))
        # Where vLLM's own parser is the first that cannot go deeper, it answers in another shape.
        assert reply.status_code == 400, (depth, reply.text)


@pytest.mark.parametrize("path", ["/v1/completions%0A", "/v1/completions%0a", "/v1/chat/completions%0A"])
def test_a_line_feed_behind_a_path_reaches_no_route(attacked: Attacked, path: str) -> None:
    body = body_of(path.partition("%")[0])
    for steering in ({}, {"steering": ALLOWED}):
        check_refusal(attacked.server.post(path, {**body, **steering}), path)


def test_a_reply_in_the_background_is_refused_while_policies_are_in_force(attacked: Attacked) -> None:
    body = {**body_of("/v1/responses"), "background": True, "store": True}
    reply = attacked.server.post("/v1/responses", body)
    check_refusal(reply, "background")
    assert reply.json()["error"]["param"] == "$.background"


def test_bodies_of_ten_thousand_entries_are_answered(attacked: Attacked) -> None:
    change = {"sae": "demo", "feature": 1, "op": "ablate"}
    plans: list[dict[str, Any]] = [
        {"interventions": [change] * 10_000},
        {"interventions": [{**change, "where": {"positions": list(range(10_000))}}]},
        {"interventions": [{**change, "when": [{"feature": 2, "above": 0}] * 10_000}]},
        {"interventions": [], **{f"k{n}": n for n in range(10_000)}},
        {"interventions": [{**change, "feature": "f" * 10_000}]},
    ]
    for steering in plans:
        reply = attacked.server.post("/v1/completions", {**body_of("/v1/completions"), "steering": steering})
        check_refusal(reply, str(steering)[:80])
    for field in ("prompt", "stop", "logit_bias"):
        values: Any = {str(n): 1.0 for n in range(10_000)} if field == "logit_bias" else ["w5"] * 10_000
        body = {**body_of("/v1/completions"), field: values, "max_tokens": 1}
        if field != "prompt":
            assert attacked.server.post("/v1/completions", body).status_code < 500
