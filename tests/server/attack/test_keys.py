"""Each scope on each class of routes, and every way to make a path look like another one."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.attack.raw import Answer, ask
from tests.server.attack.running import Attacked, policy

COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 1}
STEERED = {**COMPLETION, "steering": {"interventions": [{"sae": "demo", "feature": 3, "op": "ablate"}]}}
NAMES = ("infer", "steer", "inspect", "admin", "user")
# A request, and the keys that may make it; what they then get is not of interest here.
CLASSES: list[tuple[str, str, Any, set[str]]] = [
    ("GET", "/v1/models", None, {"infer", "user"}),
    ("GET", "/v1/responses/resp_1", None, {"infer", "user"}),
    ("POST", "/v1/responses/resp_1/cancel", {}, {"infer", "user"}),
    ("POST", "/v1/completions", COMPLETION, {"infer", "user"}),
    ("POST", "/v1/completions", STEERED, {"user"}),
    ("POST", "/tokenize", {"model": "tiny", "prompt": "w5"}, {"infer", "user"}),
    ("POST", "/invocations", COMPLETION, {"infer", "user"}),
    ("GET", "/v1/steering/saes", None, {"inspect"}),
    ("GET", "/v1/steering/policies", None, {"inspect"}),
    ("GET", "/v1/steering/policies/hold", None, {"inspect"}),
    ("GET", "/openapi.json", None, {"inspect"}),
    ("PUT", "/v1/steering/policies/absent", {}, {"admin"}),
    ("DELETE", "/v1/steering/policies/absent", None, {"admin"}),
    ("POST", "/reset_prefix_cache", None, {"admin"}),
    ("POST", "/collective_rpc", {"method": "attack_none"}, {"admin"}),
    ("GET", "/server_info", None, {"admin"}),
    ("GET", "/nothing/here", None, {"admin"}),
    ("PATCH", "/v1/models", None, {"admin"}),
]
FORBIDDEN_PATHS = [
    "/v1/steering/policies",
    "//v1/steering/policies",
    "/v1//steering/policies",
    "/v1/../v1/steering/policies",
    "/health/../v1/steering/policies",
    "/v1/%2e%2e/v1/steering/policies",
    "/health%2f%2e%2e%2fv1/steering/policies",
    "/v1%2Fsteering%2Fpolicies",
    "/%76%31/steering/policies",
    "/v1/steering/policies/",
    "/v1/steering/policies/hold.",
    "/v1/steering/policies/..",
    "/v1/steering/policies%0a",
    "/v1/steering/policies/hold%0A",
    "/v1/steering/policies%00",
    "/v1/steering/policies;/health",
    "/v1/steering/policies%3f/health",
    "/v1/steering/policies?x=/health",
    "/v1/steering/policies#/health",
    "/V1/STEERING/policies",
    "/v1/models/../steering/policies",
    "/v1/models%0a",
    "/metrics/../v1/steering/policies",
    "/metrics%2f..%2fserver_info",
    "/health/",
    "/health%0a",
    "/health%00",
    "/server_info",
]
HEADERS = [
    "Host: x/health",
    "Host: x/health?",
    "Host: x/health#",
    "Host: [",
    "Host: ",
    "X-Forwarded-Prefix: /health",
    "X-Forwarded-For: 127.0.0.1",
    "X-Forwarded-Proto: https",
    "X-Forwarded-Host: x/health",
    "Forwarded: for=127.0.0.1;host=x",
    "X-Original-URL: /health",
    "X-Rewrite-URL: /health",
    "X-HTTP-Method-Override: GET",
    "X-Script-Name: /v1",
    "X-Real-IP: 127.0.0.1",
]


def check_error(answer: Answer | httpx.Response, status: int, said: object) -> None:
    found = answer.status if isinstance(answer, Answer) else answer.status_code
    body = answer.body if isinstance(answer, Answer) else answer.content
    assert found == status, (said, found, body[:300])
    error = json.loads(body)["error"]
    kind = "AuthenticationError" if status == 401 else "PermissionDeniedError"
    assert (error["type"], error["code"]) == (kind, status), (said, error)
    assert error["message"].startswith("expected"), said
    assert "param" in error


@pytest.mark.parametrize(("method", "path", "body", "allowed"), CLASSES)
def test_each_scope_opens_its_own_routes_and_no_other(
    attacked: Attacked, method: str, path: str, body: Any, allowed: set[str]
) -> None:
    def send(head: dict[str, str]) -> httpx.Response:
        return httpx.request(method, attacked.server.url + path, json=body, headers=head, timeout=60)

    check_error(send({}), 401, "no key")
    check_error(send({"authorization": "Bearer sk-steer-000000000000-" + "A" * 43}), 401, "unknown")
    for name in NAMES:
        reply = send(attacked.head(name))
        if name in allowed:
            # An error of its own is sound, a call that no worker knows for one: it was let in.
            assert reply.status_code not in (401, 403), (name, reply.text[:300])
        else:
            check_error(reply, 403, name)


@pytest.mark.parametrize("target", FORBIDDEN_PATHS)
def test_no_spelling_of_a_path_is_open_to_a_key_that_only_infers(attacked: Attacked, target: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE"):
        check_error(ask(attacked.server.url, method, target, []), 401, (method, target))
        if "models" in target and target.endswith("models") and method == "GET":
            continue
        head = [f"Authorization: Bearer {attacked.keys['infer']}"]
        check_error(ask(attacked.server.url, method, target, head), 403, (method, target))


@pytest.mark.parametrize("target", ["/v1/steering/policies", "http://x/v1/steering/policies"])
@pytest.mark.parametrize("header", HEADERS)
def test_no_header_opens_a_route(attacked: Attacked, header: str, target: str) -> None:
    url = attacked.server.url
    for method in ("GET", "PUT"):
        check_error(ask(url, method, target, [header]), 401, header)
        head = [header, f"Authorization: Bearer {attacked.keys['infer']}"]
        check_error(ask(url, method, target, head), 403, header)


def test_a_host_that_is_no_host_is_answered_where_it_may_go(attacked: Attacked) -> None:
    head = ["Host: [", f"Authorization: Bearer {attacked.keys['all']}"]
    for method in ("GET", "PUT", "DELETE"):
        answer = ask(attacked.server.url, method, "/v1/steering/policies/absent", head)
        assert answer.status < 500, (method, answer)


def test_one_key_in_two_headers_is_the_bearers(attacked: Attacked) -> None:
    keys, url = attacked.keys, attacked.server.url
    both = [f"Authorization: Bearer {keys['infer']}", f"X-Api-Key: {keys['admin']}"]
    check_error(ask(url, "GET", "/v1/steering/policies", both), 403, "x-api-key beside a bearer")
    twice = [f"Authorization: Bearer {keys['infer']}", f"Authorization: Bearer {keys['inspect']}"]
    check_error(ask(url, "GET", "/v1/steering/policies", twice), 403, "two bearers")
    for value in (b"\xff\xfe", b"sk-steer-" + b"a" * 60_000):
        head = [f"Authorization: Bearer {value.decode('latin-1')}"]
        assert ask(url, "GET", "/v1/models", head).status in (400, 401, 431)


@pytest.mark.parametrize(
    "change",
    [
        {"feature": 16, "op": "ablate"},
        {"feature": 3, "op": "add", "value": 1.0},
        {"feature": 3, "op": "clamp", "value": 8.1},
        {"feature": 3, "op": "clamp", "value": -8.1},
        {"feature": 3, "op": "ablate", "when": {"feature": 16, "above": 0}},
        {"sae": "twin", "feature": 3, "op": "ablate"},
        {"feature": 3, "op": "ablate", "when": {"sae": "twin", "feature": 3, "above": 0}},
    ],
)
@pytest.mark.parametrize("way", ["field", "xargs", "extra_args"])
def test_a_keys_limits_hold_whatever_way_the_steering_comes(
    attacked: Attacked, change: dict[str, Any], way: str
) -> None:
    steering = {"interventions": [{"sae": "demo", **change}]}
    path, body = "/v1/completions", {**COMPLETION, "steering": steering}
    if way == "xargs":
        body = {**COMPLETION, "vllm_xargs": {"steering": json.dumps(steering)}}
    if way == "extra_args":
        path = "/inference/v1/generate"
        params = {"max_tokens": 1, "extra_args": {"steering": steering}}
        body = {"token_ids": [5, 6], "sampling_params": params}
    reply = httpx.post(attacked.server.url + path, json=body, headers=attacked.head("narrow"), timeout=60)
    assert (reply.status_code, reply.json()["error"]["type"]) == (403, "PermissionDeniedError"), reply.text
    assert "key `narrow`" in reply.json()["error"]["message"]


def test_a_name_that_leaves_the_folder_is_no_policys(attacked: Attacked) -> None:
    document = policy("x", interventions=[{"sae": "demo", "feature": 1, "op": "ablate"}]).encode()
    url, before = attacked.server.url, sorted(attacked.policies.parent.rglob("*"))
    head = [f"Authorization: Bearer {attacked.keys['admin']}", "Content-Type: application/yaml"]
    for name in (
        "..%2fx",
        "%2e%2e%2fx",
        "..",
        ".x",
        "x%00",
        "x%0a",
        "x.yaml%00",
        "%2fetc%2fx",
        "a" * 300,
        "%ff",
    ):
        answer = ask(url, "PUT", f"/v1/steering/policies/{name}", [*head, "If-None-Match: *"], document)
        assert 400 <= answer.status < 500, (name, answer)
    new = set(attacked.policies.parent.rglob("*")) - set(before)
    assert not [path for path in new if "x" in path.name and path.suffix == ".yaml"]
