import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message

from steerserve.carried import CARRIED
from steerserve.server.middleware import SteeringMiddleware
from steerserve.server.state import SteeringState

from .conftest import CHUNK, STEERING, Client, Engine, event

DONE = event("[DONE]")


def test_a_body_without_steering_reaches_the_app_byte_for_byte(post: Client, engine: Engine) -> None:
    body = b'{ "prompt":"\\u0073 says \\"steering\\"", "nested": {"x": NaN} }'
    reply = post("/v1/completions", body)
    assert engine.bodies == [body]
    assert engine.seen == [None]
    assert "steering" not in reply.json()


def test_a_steered_request_is_carried_without_the_field_and_reported(post: Client, engine: Engine) -> None:
    reply = post("/v1/completions", {"prompt": "p", "temperature": 0.1, "steering": STEERING})
    assert json.loads(engine.bodies[0]) == {"prompt": "p", "temperature": 0.1}
    (carried,) = engine.seen
    assert carried is not None
    assert carried.own is not None
    assert carried.own.rows[0].feature == 5
    report = reply.json()["steering"]
    assert report["digest"] == carried.own.digest
    assert report["interventions"][0]["before"] == {"mean": 0.5, "max": 1.0}
    assert int(reply.headers["content-length"]) == len(reply.content)


def test_the_context_is_clean_after_the_request(post: Client) -> None:
    post("/v1/completions", {"steering": STEERING})
    assert CARRIED.get() is None


def test_no_report_is_made_where_none_is_wanted(post: Client, engine: Engine) -> None:
    reply = post("/v1/completions", {"steering": {**STEERING, "report": False}})
    assert reply.json() == {"id": "x", "choices": []}
    assert engine.asked == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"\\u0073teering": {"interventions": [{"feature": 5, "op": "clamp", "value": 2}]}}',
        b'{"st\\u0065\\u0065rin\\u0067": {"interventions": [{"feature": 5, "op": "clamp", "value": 2}]}}',
        json.dumps({"steering": STEERING}).encode("utf-16"),
        json.dumps({"steering": STEERING}).encode("utf-32-le"),
        b"\xef\xbb\xbf" + json.dumps({"steering": STEERING}).encode(),
    ],
)
def test_no_spelling_of_the_key_goes_round_the_middleware(post: Client, engine: Engine, body: bytes) -> None:
    assert "steering" in post("/v1/completions", body).json()
    assert engine.seen[0] is not None


CASES: list[tuple[Any, str]] = [
    (None, "$.steering"),
    ([], "$.steering"),
    ("x", "$.steering"),
    ({}, "$.steering.interventions"),
    ({"interventions": {}}, "$.steering.interventions"),
    ({"interventions": [7]}, "$.steering.interventions[0]"),
    ({"interventions": [], "other": 1}, "$.steering.other"),
    ({"interventions": [], "report": 1}, "$.steering.report"),
    ({"interventions": [], "error": "drop"}, "$.steering.error"),
    ({"interventions": [{"feature": 500, "op": "ablate"}]}, "$.steering.interventions[0].feature"),
    ({"interventions": [{"feature": -1, "op": "ablate"}]}, "$.steering.interventions[0].feature"),
    ({"interventions": [{"feature": True, "op": "ablate"}]}, "$.steering.interventions[0].feature"),
    ({"interventions": [{"feature": 1.5, "op": "ablate"}]}, "$.steering.interventions[0].feature"),
    ({"interventions": [{"feature": "twice", "op": "ablate"}]}, "$.steering.interventions[0].feature"),
    ({"interventions": [{"feature": [[[]]], "op": "ablate"}]}, "$.steering.interventions[0].feature"),
    ({"interventions": [{"feature": 1, "op": "melt"}]}, "$.steering.interventions[0].op"),
    ({"interventions": [{"feature": 1, "op": "add", "value": True}]}, "$.steering.interventions[0].value"),
    ({"interventions": [{"feature": 1, "op": "add", "value": "4"}]}, "$.steering.interventions[0].value"),
    (
        {"interventions": [{"feature": 1, "op": "add", "value": float("nan")}]},
        "$.steering.interventions[0].value",
    ),
    (
        {"interventions": [{"feature": 1, "op": "add", "value": float("-inf")}]},
        "$.steering.interventions[0].value",
    ),
    ({"interventions": [{"feature": 1, "op": "add", "value": 1e7}]}, "$.steering.interventions[0].value"),
    ({"interventions": [{"feature": 1, "op": "add", "value": []}]}, "$.steering.interventions[0].value"),
    ({"interventions": [{"sae": "x", "feature": 1, "op": "ablate"}]}, "$.steering.interventions[0].sae"),
    (
        {"interventions": [{"direction": "x", "op": "ablate"}]},
        "$.steering.interventions[0].direction",
    ),
    ({"interventions": [{"feature": 1, "op": "ablate"}] * 2}, "$.steering.interventions[1]"),
    ({"interventions": [{"feature": n, "op": "ablate"} for n in range(5)]}, "$.steering.interventions"),
    (
        {"interventions": [{"feature": 1, "op": "ablate", "where": {"phase": "later"}}]},
        "$.steering.interventions[0].where.phase",
    ),
    (
        {"interventions": [{"feature": 1, "op": "ablate", "where": {"positions": [0] * 5000}}]},
        "$.steering.interventions[0].where.positions",
    ),
    (
        {"interventions": [{"feature": 1, "op": "ablate", "when": {"feature": 999, "above": 1}}]},
        "$.steering.interventions[0].when.feature",
    ),
    ({"interventions": [], "pad": "x" * 300_000}, "$.steering"),
]


@pytest.mark.parametrize(("steering", "param"), CASES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_what_is_wrong_is_named_before_the_app_sees_anything(
    post: Client, engine: Engine, steering: Any, param: str, path: str
) -> None:
    reply = post(path, {"prompt": "p", "stream": True, "steering": steering})
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert (error["param"], error["type"], error["code"]) == (param, "BadRequestError", 400)
    assert error["message"].endswith(f"- at {param}")
    assert engine.bodies == []


RAW: list[tuple[bytes, str]] = [
    (b'{"steering": {"interventions": []}, "steering": {"interventions": []}}', "$.steering"),
    (b'{"steering": {"interventions": [], "interventions": []}}', "$.steering.interventions"),
    (
        b'{"steering": {"interventions": [{"feature": 1, "op": "ablate", "op": "ablate"}]}}',
        "$.steering.interventions[0].op",
    ),
    (
        b'{"steering": {"interventions": [{"feature": 1, "op": "add", "value": 1e999}]}}',
        "$.steering.interventions[0].value",
    ),
    (b'{"steering": {"interventions": [', "$"),
    (b'{"steering": ' + b"[" * 100_000, "$"),
    (b'{"steering": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "$"),
    (b'{"steering": {"interventions": [{"feature": ' + b"9" * 5000 + b"}]}}", "$"),
    (b'{"steering": "\xff"}', "$"),
]


@pytest.mark.parametrize(("body", "param"), RAW)
def test_bodies_that_no_parser_should_guess_about_are_refused(
    post: Client, engine: Engine, body: bytes, param: str
) -> None:
    reply = post("/v1/completions", body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert engine.bodies == []


def test_a_large_prompt_beside_a_small_steering_is_served(post: Client) -> None:
    assert "steering" in post("/v1/completions", {"prompt": "x " * 400_000, "steering": STEERING}).json()


def test_repeated_keys_elsewhere_in_the_body_are_not_our_business(post: Client) -> None:
    body = b'{"a": {"b": 1, "b": 2}, "steering": ' + json.dumps(STEERING).encode() + b"}"
    assert "steering" in post("/v1/completions", body).json()


@pytest.mark.parametrize("name", ["use_beam_search", "prompt_embeds", "background"])
def test_options_that_steering_cannot_stand_beside_are_named(post: Client, engine: Engine, name: str) -> None:
    reply = post("/v1/completions", {name: True, "steering": STEERING})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, f"$.{name}")
    assert post("/v1/completions", {name: False, "steering": STEERING}).status_code == 200
    assert len(engine.bodies) == 1


def test_steering_in_two_places_is_refused(post: Client, engine: Engine) -> None:
    reply = post("/v1/completions", {"vllm_xargs": {"steering": "{}"}, "steering": STEERING})
    assert reply.json()["error"]["param"] == "$.vllm_xargs.steering"
    assert engine.bodies == []


def test_a_route_that_cannot_carry_steering_never_runs(post: Client, engine: Engine) -> None:
    reply = post("/v1/embeddings", {"input": "x", "steering": STEERING})
    assert reply.status_code == 400
    assert "/v1/embeddings" in reply.json()["error"]["message"]
    assert engine.bodies == []


@pytest.mark.parametrize("disposition", ['name="steering"', "name=steering", 'NAME="steering"; filename="s"'])
def test_a_form_with_a_steering_field_is_refused(post: Client, engine: Engine, disposition: str) -> None:
    form = f"--b\r\nContent-Disposition: form-data; {disposition}\r\n\r\n{{}}\r\n--b--\r\n".encode()
    reply = post("/v1/embeddings", form, content_type="multipart/form-data; boundary=b")
    assert reply.status_code == 400
    assert engine.bodies == []


def test_a_form_without_one_passes(post: Client, engine: Engine) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n{"x": "steering"}\r\n--b--\r\n'
    assert post("/v1/embeddings", form, content_type="multipart/form-data; boundary=b").status_code == 200
    assert engine.bodies == [form]


def test_without_a_catalog_all_steering_is_refused(
    post: Client, state: SteeringState, engine: Engine
) -> None:
    state.catalog = None
    assert "no SAE is served" in post("/v1/completions", {"steering": STEERING}).json()["error"]["message"]
    assert post("/v1/completions", {"prompt": "p"}).status_code == 200
    assert len(engine.bodies) == 1


def test_an_anthropic_route_answers_in_both_shapes(post: Client) -> None:
    body = post("/v1/messages", {"steering": 1}).json()
    assert body["type"] == "error"
    assert body["error"]["param"] == "$.steering"


def test_a_reply_that_was_never_admitted_is_not_served(post: Client, engine: Engine) -> None:
    engine.admits = False
    reply = post("/v1/completions", {"steering": STEERING})
    assert reply.status_code == 400
    assert "cannot carry steering" in reply.json()["error"]["message"]


def test_a_failure_of_the_route_itself_passes_untouched(post: Client, engine: Engine) -> None:
    engine.admits = False
    reply = post("/v1/responses", {"steering": STEERING})
    assert (reply.status_code, reply.json()) == (404, {"error": {"message": "no"}})


def test_a_stream_ends_with_the_report_before_done(post: Client) -> None:
    chunks = [event({**CHUNK, "n": 0}), event(CHUNK), DONE]
    reply = post("/v1/chat/completions", {"stream": True, "steering": STEERING}, chunks=chunks)
    events = reply.content.split(b"\n\n")
    assert events[:2] == [chunk.removesuffix(b"\n\n") for chunk in chunks[:2]]
    last = json.loads(events[2].removeprefix(b"data: "))
    assert (last["id"], last["model"], last["choices"]) == ("cmpl-1", "m", [])
    assert last["steering"]["interventions"][0]["tokens"] == 4
    assert events[3] == b"data: [DONE]"


def test_a_stream_cut_anywhere_is_put_together_again(post: Client) -> None:
    whole = event(CHUNK) + event(CHUNK) + DONE
    for cut in range(1, len(whole) - 1, 7):
        chunks = [b": hello\n\n", whole[:cut], whole[cut:]]
        body = {"stream": True, "steering": STEERING}
        text = post("/v1/chat/completions", body, chunks=chunks).content
        assert text.count(b'"steering"') == 1
        assert text.startswith(b": hello\n\n" + event(CHUNK) + event(CHUNK))
        assert text.endswith(DONE)


def test_the_responses_api_gets_its_report_inside_the_response(post: Client) -> None:
    last = event({"type": "response.completed", "response": {"id": "r"}}, "response.completed")
    chunks = [event({"type": "response.created"}, "response.created"), event({"type": "x"}, "x"), last]
    reply = post("/v1/chat/completions", {"stream": True, "steering": STEERING}, chunks=chunks)
    data = json.loads(reply.content.strip().split(b"\ndata: ")[-1])
    assert data["response"]["steering"]["interventions"][0]["op"] == "clamp"


def test_the_messages_api_gets_its_report_in_the_last_event(post: Client) -> None:
    chunks = [event({"type": "message_start"}, "message_start"), event({"type": "y"}, "y")]
    chunks.append(event({"type": "message_stop"}, "message_stop"))
    reply = post("/v1/chat/completions", {"stream": True, "steering": STEERING}, chunks=chunks)
    data = json.loads(reply.content.strip().split(b"\ndata: ")[-1])
    assert data["type"] == "message_stop"
    assert data["steering"]["requests"] == 1


def test_a_stream_that_was_never_admitted_becomes_a_refusal(post: Client, engine: Engine) -> None:
    engine.admits = False
    chunks = [event(CHUNK), event(CHUNK), DONE]
    reply = post("/v1/chat/completions", {"stream": True, "steering": STEERING}, chunks=chunks)
    assert reply.status_code == 400
    assert "text" not in reply.json()


def test_a_long_stream_that_is_not_admitted_is_stopped(post: Client, engine: Engine) -> None:
    engine.admits = False
    chunks = [event({"text": "x" * 400_000})] * 100
    reply = post("/v1/chat/completions", {"stream": True, "steering": STEERING}, chunks=chunks)
    assert reply.status_code == 400
    assert reply.headers["content-type"] == "application/json"


def test_an_error_before_admission_is_a_proper_error_not_a_stream(post: Client, engine: Engine) -> None:
    engine.admits = False
    chunks = [event({"error": {"message": "too long", "code": 400, "param": "prompt"}}), b"", DONE]
    reply = post("/v1/chat/completions", {"stream": True, "steering": STEERING}, chunks=chunks)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")


def test_a_mounted_server_matches_routes_without_its_prefix(state: SteeringState, engine: Engine) -> None:
    sent: list[Message] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        engine.take((await receive())["body"])
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    scope = {"type": "http", "method": "POST", "path": "/api/v1/completions", "root_path": "/api"}
    asyncio.run(drive(SteeringMiddleware(app, state), scope, sent))
    assert engine.seen[0] is not None


def test_a_client_that_leaves_mid_stream_cancels_the_app_and_the_report(
    state: SteeringState, engine: Engine
) -> None:
    stopped: list[str] = []

    async def stream(request: Request) -> Response:
        engine.take(await request.body())

        async def produce() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield event(CHUNK)
                    await asyncio.sleep(0.001)
            finally:
                stopped.append("stopped")

        return StreamingResponse(produce(), media_type="text/event-stream")

    app = SteeringMiddleware(Starlette(routes=[Route("/v1/completions", stream, methods=["POST"])]), state)
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "root_path": ""}
    sent: list[Message] = []
    asyncio.run(drive(app, scope, sent, leave_after=3))
    assert stopped == ["stopped"]
    assert engine.asked == []
    assert state.collector is not None
    assert engine.seen[0] is not None
    assert engine.seen[0].ticket in state.collector._abandoned


@pytest.mark.parametrize("query", [b"steering={}", b"a=1&Stering=1", b"extra_body=%7B%22steering%22:1%7D"])
def test_a_websocket_that_asks_in_its_query_never_begins(state: SteeringState, query: bytes) -> None:
    sent: list[Message] = []

    async def app(*_: Any) -> None:
        raise AssertionError("reached")

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": [], "query_string": query}
    asyncio.run(SteeringMiddleware(app, state)(scope, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.mark.parametrize(
    "asks",
    [
        {"steering": STEERING},
        {"session": {"steering": STEERING}},
        {"Steering": STEERING},
        {"interventions": []},
    ],
)
def test_a_websocket_message_with_steering_ends_the_session(
    state: SteeringState, asks: dict[str, Any]
) -> None:
    seen: list[Message] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] != "websocket.disconnect":
            seen.append(message)

    messages = iter([{"type": "session.update"}, {"type": "session.update", **asks}])

    async def receive() -> Message:
        return {"type": "websocket.receive", "text": json.dumps(next(messages))}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(
        SteeringMiddleware(app, state)(
            {"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send
        )
    )
    assert len(seen) == 1
    assert sent[0]["type"] == "websocket.close"
    assert "steering" in sent[0]["reason"]


async def drive(
    app: Any, scope: dict[str, Any], sent: list[Message], *, leave_after: int | None = None
) -> None:
    """Run a request through an ASGI app; the client leaves after that many messages of the reply."""
    body = json.dumps({"steering": STEERING, "stream": True}).encode()
    left = asyncio.Event()
    first = True

    async def receive() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        if leave_after is not None and len(sent) >= leave_after:
            left.set()

    headers = [(b"content-type", b"application/json")]
    await app({**scope, "headers": headers, "query_string": b""}, receive, send)
