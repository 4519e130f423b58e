"""Steering that is misplaced, misspelt or doubled, on every generating route: honoured or refused."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest

from steerserve.server.routing import CARRYING
from tests.server.conftest import Server
from tests.support.misplaced import BODIES, MESSAGES, Form, forms
from tests.support.scale import REST, scaled

# Of each route: of eight routes, 320 and 3,200.
QUICK, MOST = 40, 400
CHANGE = {"sae": "demo", "feature": 5, "op": "clamp", "value": 8.0}
STEERING = {"interventions": [CHANGE]}
BEAMS = {"use_beam_search": True, "n": 2, "temperature": 0, "max_tokens": 2}
SCHEMA = {"type": "object", "properties": {"steering": {"type": "integer"}}, "required": ["steering"]}


def send(server: Server, route: str, form: Form) -> httpx.Response:
    url = f"{route}?{form.query}" if form.query else route
    return server.http.post(url, content=form.content, headers=dict(form.head))


def chosen(route: str) -> list[Form]:
    """A share of a route's forms, drawn with its name as the seed."""
    every = list(forms(route, STEERING))
    random.Random(route).shuffle(every)
    return every[QUICK:MOST] if REST else every[:QUICK]


def test_every_generating_route_has_forms(server: Server) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    assert set(paths) & set(CARRYING) <= {*BODIES, "/v1/systemone"}


@scaled
@pytest.mark.parametrize("route", BODIES)
def test_whatever_asks_for_steering_is_reported_or_refused(server: Server, route: str) -> None:
    honoured = 0
    for form in chosen(route):
        reply = send(server, route, form)
        if reply.status_code == 200:
            assert reply.json()["steering"]["interventions"][0]["tokens"] > 0, form.asked
            honoured += 1
        else:
            assert 400 <= reply.status_code < 500, (form.asked, reply.text)
            assert reply.json()["error"]["message"], form.asked
    assert honoured < 10


@pytest.mark.parametrize("route", BODIES)
def test_what_is_likeliest_to_slip_is_refused_by_its_place(server: Server, route: str) -> None:
    body = {"model": "tiny", **BODIES[route]}
    generated = server.metric("vllm:generation_tokens_total")
    for more, param in (
        (STEERING, "$.interventions"),
        ({"extra_body": {"steering": STEERING}}, "$.extra_body.steering"),
        ({"metadata": {"steering": json.dumps(STEERING)}}, "$.metadata.steering"),
        ({"chat_template_kwargs": {"steering": STEERING}}, "$.chat_template_kwargs.steering"),
        ({"Steering": STEERING}, "$.Steering"),
        ({"steer": STEERING}, "$.steer"),
    ):
        reply = server.post(route, {**body, **more})
        assert reply.status_code == 400, (more, reply.text)
        assert reply.json()["error"]["param"] == param
    assert server.metric("vllm:generation_tokens_total") == generated


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/invocations"])
@pytest.mark.parametrize("steering", ["garbage", json.dumps(STEERING)])
def test_beam_search_is_refused_beside_steering_by_whatever_way_it_came(
    server: Server, route: str, steering: str
) -> None:
    body = {"model": "tiny", **BODIES[route], **BEAMS}
    assert server.post(route, body).status_code == 200
    for more in ({"vllm_xargs": {"steering": steering}}, {"steering": STEERING}):
        reply = server.post(route, {**body, **more})
        assert reply.status_code == 400, reply.text
        assert "steering" in reply.json()["error"]["message"]


def test_steering_in_vllm_xargs_has_the_report_of_the_field(server: Server) -> None:
    body = {"model": "tiny", **BODIES["/v1/completions"]}
    by_field = server.post("/v1/completions", {**body, "steering": STEERING}).json()
    by_xargs = server.post(
        "/v1/completions", {**body, "vllm_xargs": {"steering": json.dumps(STEERING)}}
    ).json()
    assert by_xargs["steering"] == by_field["steering"]
    assert by_xargs["choices"][0]["text"] == by_field["choices"][0]["text"]


TOOL = {"type": "function", "function": {"name": "steering", "parameters": SCHEMA}}
FREE: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": json.dumps(STEERING), "max_tokens": 2, "stop": ["steering"]}),
    ("/v1/completions", {"prompt": [5], "max_tokens": 2, "metadata": {"plan": json.dumps(STEERING)}}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "tools": [TOOL], "tool_choice": "none"}),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": json.dumps(STEERING)}],
            "max_tokens": 2,
            "documents": [{"title": "car", "steering": "power"}],
        },
    ),
    ("/v1/responses", {"input": "w5", "max_output_tokens": 2, "instructions": json.dumps(STEERING)}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 2, "system": json.dumps(STEERING)}),
    ("/tokenize", {"messages": MESSAGES, "tools": [TOOL]}),
]


@pytest.mark.parametrize(("route", "body"), FREE)
def test_what_a_client_may_name_as_it_likes_is_served(
    server: Server, route: str, body: dict[str, Any]
) -> None:
    reply = server.post(route, {"model": "tiny", **body})
    assert reply.status_code == 200, reply.text
    assert "report" not in reply.json()
