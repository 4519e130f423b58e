"""What is malformed is refused by name on every route, generates nothing, and leaves the server alive."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from steerserve.server.routing import CARRYING
from tests.server.conftest import KEY, MAX_LENGTH, Server
from tests.support.models import VOCAB

GOOD = {"interventions": [{"feature": 5, "op": "clamp", "value": 8.0}]}
AT = "$.steering.interventions[0]"


def change(**keys: Any) -> dict[str, Any]:
    return {"interventions": [{"feature": 5, "op": "clamp", "value": 8.0, **keys}]}


MALFORMED: list[tuple[Any, str]] = [
    (None, "$.steering"),
    ([GOOD], "$.steering"),
    (json.dumps(GOOD), "$.steering"),
    ({}, "$.steering.interventions"),
    ({**GOOD, "strength": 2}, "$.steering.strength"),
    ({**GOOD, "error": "drop"}, "$.steering.error"),
    (change(feature=128), f"{AT}.feature"),
    (change(feature=2**40), f"{AT}.feature"),
    (change(feature=True), f"{AT}.feature"),
    (change(feature="nothing"), f"{AT}.feature"),
    (change(feature=[[[[]]]]), f"{AT}.feature"),
    (change(sae="other"), f"{AT}.sae"),
    (change(value=float("nan")), f"{AT}.value"),
    (change(value=float("inf")), f"{AT}.value"),
    (change(value=False), f"{AT}.value"),
    (change(value="8"), f"{AT}.value"),
    (change(value=1e300), f"{AT}.value"),
    (change(op="melt"), f"{AT}.op"),
    (change(where={"phase": "now"}), f"{AT}.where.phase"),
    (change(where={"positions": [0.5]}), f"{AT}.where.positions[0]"),
    (change(where={"positions": [1, MAX_LENGTH]}), f"{AT}.where.positions[1]"),
    (change(where={"tokens": [VOCAB]}), f"{AT}.where.tokens[0]"),
    (change(where={"start": 3, "stop": 3}), f"{AT}.where"),
    (change(feature="5"), f"{AT}.feature"),
    (change(strength=3.0), f"{AT}.strength"),
    (change(when={"feature": 500, "above": 0}), f"{AT}.when.feature"),
    ({"interventions": GOOD["interventions"] * 2}, "$.steering.interventions[1]"),
    (
        {"interventions": [{"feature": n, "op": "ablate"} for n in range(17)]},
        "$.steering.interventions",
    ),
    ({**GOOD, "pad": "x" * 300_000}, "$.steering"),
]


@pytest.fixture(scope="module")
def post_routes(server: Server) -> list[str]:
    """Every POST route that the server documents."""
    paths = server.http.get("/openapi.json").json()["paths"]
    return sorted(path for path, methods in paths.items() if "post" in methods)


def send(server: Server, path: str, steering: Any, **rest: Any) -> httpx.Response:
    content = json.dumps({"model": "tiny", "stream": True, **rest, "steering": steering})
    return server.http.post(path, content=content, headers={"content-type": "application/json"})


def test_malformed_steering_is_refused_by_name_on_every_generating_route(
    server: Server, post_routes: list[str]
) -> None:
    generating = [path for path in post_routes if path in CARRYING]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"} <= set(generating)
    generated = server.metric("vllm:generation_tokens_total")
    for path in generating:
        for steering, param in MALFORMED:
            reply = send(server, path, steering)
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (400, param), (path, steering)
            assert (error["type"], error["code"]) == ("BadRequestError", 400)
            assert reply.headers["content-type"] == "application/json"
    assert server.metric("vllm:generation_tokens_total") == generated
    assert server.openai.completions.create(model="tiny", prompt="w5", max_tokens=1).choices


def test_every_other_post_route_refuses_steering(server: Server, post_routes: list[str]) -> None:
    others = [path for path in post_routes if path not in CARRYING]
    assert {"/tokenize", "/detokenize", "/v1/messages/count_tokens"} <= set(others)
    for path in others:
        path = path.replace("{response_id}", "r")
        reply = send(server, path, GOOD)
        assert reply.status_code == 400, path
        assert reply.json()["error"]["param"] == "$.steering"
        assert path in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tiny", "prompt": "w5", "steering": {"interventions": []}, "steering": {}}',
        b'{"model": "tiny", "prompt": "w5", "steering": {"interventions": [], "interventions": []}}',
        b'{"model": "tiny", "prompt": "w5", "\\u0073teering": 1}',
        json.dumps({"model": "tiny", "prompt": "w5", "steering": 1}).encode("utf-16"),
        b'{"model": "tiny", "prompt": "w5", "steering": ' + b"[" * 100_000,
        b'{"model": "tiny", "prompt": "w5", "steering": {"interventions": [',
    ],
    ids=["twice", "key twice", "escaped", "utf-16", "nested", "cut off"],
)
def test_no_way_of_writing_the_body_goes_round_the_refusal(server: Server, body: bytes) -> None:
    head = {"content-type": "application/json"}
    reply = server.http.post("/v1/completions", content=body, headers=head)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "BadRequestError"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_beam_search", True),
        ("prompt_embeds", "AAAA"),
        ("background", True),
        ("vllm_xargs", {"steering": "{}"}),
    ],
)
def test_options_beside_which_steering_means_nothing_are_named(
    server: Server, option: str, value: Any
) -> None:
    reply = send(server, "/v1/completions", GOOD, prompt="w5", **{option: value})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith(f"$.{option}")


def test_an_object_by_xargs_is_refused_in_one_sentence_on_every_route(
    server: Server, post_routes: list[str]
) -> None:
    """vLLM's own answer is a line for each form that an extra argument may have."""
    read = [path for path in post_routes if path in CARRYING and path != "/inference/v1/generate"]
    assert "/v1/completions" in read
    for path in read:
        reply = server.post(path, {"model": "tiny", "prompt": "w5", "vllm_xargs": {"steering": GOOD}})
        error = reply.json()["error"]
        assert reply.status_code == 400, path
        if error["message"].startswith(
            "expected `vllm_xargs.steering` to be a string of JSON, got an object"
        ):
            assert error["param"] == "$.vllm_xargs.steering"
        else:
            # A route that reads no such arguments at all.
            assert "nothing reads it there" in error["message"], (path, error)


@pytest.mark.parametrize("stream", [False, True])
def test_malformed_xargs_are_refused_at_admission(server: Server, stream: bool) -> None:
    steering = json.dumps(change(feature=500))
    body = {"model": "tiny", "prompt": "w5", "stream": stream, "vllm_xargs": {"steering": steering}}
    reply = server.post("/v1/completions", body)
    assert f"{AT}.feature" in reply.text
    assert '"text"' not in reply.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_the_engine_refuses_keeps_its_own_error(server: Server, stream: bool) -> None:
    reply = server.post(
        "/v1/completions",
        {"model": "tiny", "prompt": [5] * 5000, "max_tokens": 4, "stream": stream, "steering": GOOD},
    )
    assert reply.status_code == 400
    assert "maximum" in reply.json()["error"]["message"]


def test_an_unknown_model_is_vllms_own_refusal(server: Server) -> None:
    reply = server.post("/v1/completions", {"model": "other", "prompt": "w5", "steering": GOOD})
    assert reply.status_code == 404


def test_the_key_is_asked_for_before_anything_is_read(server: Server) -> None:
    body = {"model": "tiny", "prompt": "w5", "steering": {"interventions": 7}}
    for path in ("/v1/completions", "/v1/messages"):
        assert httpx.post(server.url + path, json=body).status_code == 401
    assert httpx.get(f"{server.url}/v1/steering/saes").status_code == 401
    head = {"authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{server.url}/v1/steering/saes", headers=head).status_code == 200
