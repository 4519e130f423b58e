from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from starlette._utils import get_route_path

from steerserve.errors import RequestError, RouteError
from steerserve.server.body import check_line, is_set, take_steering
from steerserve.server.names import means_us
from steerserve.server.places import check_document, check_fields, check_head, check_names
from steerserve.server.routing import path_of
from tests.support.misplaced import BODIES, Form, forms, lines

CHANGE: dict[str, Any] = {"feature": 5, "op": "clamp", "value": 2.0}
ASKED: dict[str, Any] = {"interventions": [CHANGE]}
NONE = "/v1/embeddings"
# Of these, every spelling in every place.
WHOLE = ("/inference/v1/generate", "/v1/chat/completions")
# Where each route reads it: as an object, or as JSON text.
READ = {
    "/generative_scoring": {"`steering` as an object in the body"},
    "/inference/v1/generate": {
        "`steering` as an object in extra_args of sampling_params",
        "`steering` as text in extra_args of sampling_params",
    },
}
BY_XARGS = {"`steering` as text in vllm_xargs"}


def scope(path: str = "/v1/completions", query: bytes = b"", **headers: str) -> dict[str, Any]:
    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "path": path, "query_string": query, "headers": lines}


def outcome(form: Form, route: str) -> str:
    """What becomes of a request before the app sees it: "honoured", "refused" or "ignored"."""
    head = [(name.encode(), value.encode()) for name, value in form.head]
    try:
        check_head({**scope(route, form.query.encode()), "headers": head})
        taken = take_steering(form.content, dict(form.head)["content-type"], route)
    except RequestError:
        return "refused"
    return "ignored" if taken is None else "honoured"


@pytest.mark.parametrize("route", [*BODIES, NONE, "/tokenize", "/v1/audio/transcriptions"])
def test_whatever_asks_for_steering_is_honoured_or_refused_on_every_route(route: str) -> None:
    whole = route in WHOLE
    found = {form.asked: outcome(form, route) for form in forms(route, ASKED, whole=whole)}
    assert len(found) > (1200 if whole else 200)
    assert [asked for asked, became in found.items() if became == "ignored"] == []
    # As text at the top of the body it is taken, to be refused as what it is.
    honoured = {asked for asked, became in found.items() if became == "honoured"}
    top = {f"`steering` as {kind} in the body" for kind in ("an object", "text")}
    elsewhere = READ.get(route, BY_XARGS if route in BODIES else set())
    assert honoured - {"a key twice inside"} == top | elsewhere


def test_a_line_of_a_batch_file_is_held_to_the_rule_of_bodies() -> None:
    passed = []
    for said, line in lines(ASKED):
        try:
            check_line(line)
            passed.append(said)
        except RequestError:
            continue
    assert passed == ["`steering` as text in vllm_xargs"]


@pytest.mark.parametrize(
    "more",
    [
        {"use_beam_search": True, "n": 2},
        {"prompt_embeds": "x"},
        {"background": True},
    ],
)
def test_a_line_that_is_steered_is_held_to_the_options_of_the_field(more: dict[str, Any]) -> None:
    body = {"vllm_xargs": {"steering": "garbage"}, **more}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    with pytest.raises(RequestError):
        check_line(json.dumps(line))
    del body["vllm_xargs"]
    check_line(json.dumps(line))


@pytest.mark.parametrize("line", ["{", "[]", "1", '{"body": [1]}', '{"custom_id": "steering", "body": {}}'])
def test_what_is_no_line_is_left_to_the_reader_of_lines(line: str) -> None:
    check_line(line)


def test_a_line_that_cannot_be_read_and_mentions_us_is_refused() -> None:
    with pytest.raises(RequestError, match="valid JSON"):
        check_line('{"body": {"steering": {')


@pytest.mark.parametrize(
    "head",
    [
        scope("/v1/completions\n"),
        scope(query=b"steering=1"),
        scope(query=b"a=1&steerin%67"),
        scope(query=b"vllm_xargs=%7B%22steering%22:1%7D"),
        scope(steering="{}"),
        scope(x_steering="1"),
        scope(content_encoding="gzip"),
        scope(content_encoding="identity, br"),
    ],
)
def test_what_stands_in_a_requests_head_to_be_passed_over_is_refused(head: dict[str, Any]) -> None:
    with pytest.raises(RouteError, match="expected"):
        check_head(head)


@pytest.mark.parametrize(
    "head",
    [
        scope(),
        scope(query=b"q=steering&x"),
        scope(content_encoding=" Identity "),
        # Of a network, which steers traffic; and of clients that say what they are.
        scope(x_traffic_steering="blue"),
        scope(user_agent="steerserve", x_stainless_lang="python"),
    ],
)
def test_any_other_head_passes(head: dict[str, Any]) -> None:
    check_head(head)


@pytest.mark.parametrize(
    ("document", "at"),
    [
        ({"extra_body": {"steering": ASKED}}, "$.extra_body.steering"),
        ({"sampling_params": {"extra_args": {"steering": 1}}}, "$.sampling_params.extra_args.steering"),
        ({"messages": [{}, {"role": "user", "steering": ASKED}]}, "$.messages[1].steering"),
        ({"messages": [[{}], [{}, {"steering": ASKED}]]}, "$.messages[1][1].steering"),
        ({"messages": [{"content": [{"steering": 1}]}]}, "$.messages[0].content[0].steering"),
        ({"input": [{"steering": ASKED}]}, "$.input[0].steering"),
        ({"interventions": []}, "$.interventions"),
        ({"metadata": {"steering": "x"}}, "$.metadata.steering"),
        ({"a": {"b": [0, CHANGE]}}, "$.a.b[1]"),
        ({"a": json.dumps({"b": ASKED})}, "$.a.b.interventions"),
    ],
)
def test_steering_where_no_route_reads_it_is_refused_by_its_place(document: dict[str, Any], at: str) -> None:
    with pytest.raises(RouteError) as caught:
        take_steering(json.dumps(document).encode(), "application/json", "/v1/completions")
    assert caught.value.param == at


SCHEMA = {
    "type": "object",
    "properties": {"steering": {"type": "number"}, "interventions": {"type": "array"}},
}
ARGUMENTS = {"steering": {"left": 1}, "op": "add", "feature": "x"}
WORDS = "talk of steering and of interventions"
TOOL = {"type": "function", "function": {"name": "steering", "description": WORDS, "parameters": SCHEMA}}
CALL = {"id": "c", "type": "function", "function": {"name": "steering", "arguments": json.dumps(ARGUMENTS)}}
TURNS = [
    {"role": "user", "content": '{"steering": {"interventions": []}}'},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": json.dumps(ARGUMENTS)},
]
CHAT = {
    "messages": TURNS,
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "steering"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "steering", "schema": SCHEMA}},
    "documents": [{"title": "car", "steering": "power"}],
    "stop": ["steering", '{"steering": 1}'],
    "metadata": {"topic": "steering", "plan": json.dumps(ASKED)},
    "structured_outputs": {"json": SCHEMA},
    "user": '{"steering": 1}',
    "vllm_xargs": {"session_id": "steering"},
    "chat_template_kwargs": {"enable_thinking": False, "topic": "steering"},
}
FREE: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions/render", CHAT),
    ("/tokenize", CHAT),
    ("/v1/chat/completions/batch", {**CHAT, "messages": [TURNS, TURNS]}),
    (
        "/v1/chat/completions",
        {"messages": TURNS, "structured_outputs": {"structural_tag": json.dumps(SCHEMA)}},
    ),
    ("/v1/chat/completions", {"response_format": {"type": "structural_tag", "format": {"schema": SCHEMA}}}),
    (
        "/v1/completions",
        {"prompt": json.dumps(ASKED), "suffix": WORDS, "structured_outputs": {"json": SCHEMA}},
    ),
    ("/v1/completions", {"prompt": ["{steering", json.dumps([CHANGE])], "stop": json.dumps(ASKED)}),
    (
        "/v1/responses",
        {
            "input": [
                {"type": "function_call", "name": "steering", "arguments": json.dumps(ARGUMENTS)},
                {"type": "function_call_output", "call_id": "c", "output": json.dumps(ARGUMENTS)},
            ],
            "instructions": json.dumps(ASKED),
            "tools": [{"type": "function", "name": "steering", "parameters": SCHEMA}],
            "text": {"format": {"type": "json_schema", "name": "steering", "schema": SCHEMA}},
            "prompt": {"id": "p", "variables": {"steering": "left"}},
        },
    ),
    (
        "/v1/messages",
        {
            "system": WORDS,
            "messages": [
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "name": "steering", "input": ARGUMENTS}],
                },
                {"role": "user", "content": [{"type": "tool_result", "content": json.dumps(ARGUMENTS)}]},
            ],
            "tools": [{"name": "steering", "input_schema": SCHEMA}],
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        },
    ),
    (
        "/cohere/v2/chat",
        {"documents": [{"data": {"steering": "power"}}], "response_format": {"schema": SCHEMA}},
    ),
    ("/inference/v1/generate", {"sampling_params": {"structured_outputs": {"json": SCHEMA}}}),
    (
        "/v1/systemone",
        {
            "state": {"steering": 1},
            "questions": {"steering": {"type": "choice", "criteria": {"steer": "left"}}},
        },
    ),
    ("/v1/chat/completions/derender", {"generate_response": {"choices": [], "steering": {"plan": "x"}}}),
    ("/v1/completions/derender", {"generate_responses": [{"steering": {"interventions": []}}]}),
    ("/v1/audio/transcriptions", {"language": "en", "a": [1, "{", "[steering"]}),
]


@pytest.mark.parametrize(("route", "document"), FREE)
def test_what_a_client_may_name_as_it_likes_passes(route: str, document: dict[str, Any]) -> None:
    assert take_steering(json.dumps(document).encode(), "application/json", route) is None


@pytest.mark.parametrize(("route", "document"), FREE)
def test_no_place_is_free_on_a_route_that_has_none(route: str, document: dict[str, Any]) -> None:
    """What is the client's own is so by its place in a body that this route reads."""
    keyed = json.dumps(document).replace('\\"', "'")
    if '"steering":' in keyed:
        with pytest.raises(RouteError):
            take_steering(json.dumps(document).encode(), "application/json", "/v1/embeddings")


@pytest.mark.parametrize(
    ("path", "document"),
    [
        ("/v1/completions", {"vllm_xargs": {"steering": "{}"}}),
        ("/v1/chat/completions/render", {"vllm_xargs": {"steering": "{}"}}),
        ("/inference/v1/generate", {"sampling_params": {"extra_args": {"steering": ASKED}}}),
    ],
)
def test_what_a_route_reads_passes(path: str, document: dict[str, Any]) -> None:
    check_document(document, path)


def test_what_vllm_xargs_hold_is_taken_as_if_it_stood_in_the_body() -> None:
    body = {"prompt": "p", "vllm_xargs": {"steering": json.dumps(ASKED), "session_id": "s"}}
    taken = take_steering(json.dumps(body).encode(), "application/json", "/v1/completions")
    assert taken == (ASKED, {"prompt": "p", "vllm_xargs": {"session_id": "s"}})
    params: dict[str, Any] = {"max_tokens": 1, "extra_args": {"steering": ASKED}}
    asked = {"token_ids": [1], "sampling_params": params}
    taken = take_steering(json.dumps(asked).encode(), "application/json", "/inference/v1/generate")
    assert taken == (ASKED, {"token_ids": [1], "sampling_params": {"max_tokens": 1, "extra_args": {}}})


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        (ASKED, "as JSON text here, got an object"),
        ([ASKED], "as JSON text here"),
        ("garbage", "valid JSON"),
        ('{"interventions": [], "interventions": []}', "each key once"),
        ("x" * 300_000, "at most"),
        ("[" * 100_000, "valid JSON"),
    ],
)
def test_what_vllm_xargs_hold_is_refused_for_what_it_is(steering: Any, message: str) -> None:
    body = {"prompt": "p", "vllm_xargs": {"steering": steering}}
    with pytest.raises(RequestError, match=message):
        take_steering(json.dumps(body).encode(), "application/json", "/v1/completions")


def test_what_is_rendered_goes_on_whole_to_the_route_that_runs_it() -> None:
    body = {"messages": [], "vllm_xargs": {"steering": json.dumps(ASKED)}}
    assert take_steering(json.dumps(body).encode(), "application/json", "/v1/chat/completions/render") is None


@pytest.mark.parametrize("path", ["/generative_scoring", "/inference/v1/generate", "/tokenize"])
def test_xargs_of_a_route_that_reads_none_are_refused(path: str) -> None:
    with pytest.raises(RouteError, match="nothing reads it there"):
        check_document({"vllm_xargs": {"steering": "{}"}}, path)


@pytest.mark.parametrize("text", [False, True])
def test_nobody_keeps_the_server_busy_with_names_that_nearly_mean_us(text: bool) -> None:
    names = ["".join(letters) for letters in itertools.permutations("gnireets")]
    names = [name for name in sorted(set(names)) if not means_us(name)][:3000]
    for many in (3000, 1500):
        held: Any = dict.fromkeys(names[:many], 1)
        body = json.dumps({"x": json.dumps(held) if text else held}).encode()
        if many > 2000:
            with pytest.raises(RequestError, match="at most 2000 keys that resemble"):
                take_steering(body, "application/json", "/v1/completions")
        else:
            assert take_steering(body, "application/json", "/v1/completions") is None


def test_names_are_looked_for_at_any_depth() -> None:
    value: Any = {"Steering": 1}
    for _ in range(5000):
        value = {"a": [value]}
    with pytest.raises(RouteError):
        check_names(value, ("extra_args",))


def test_a_form_written_as_a_query_cannot_carry_steering() -> None:
    for form in (b"model=m&steering=%7B%7D", b"a%5Bsteering%5D=1", b"extra_body=%7B%22steering%22:1%7D"):
        with pytest.raises(RouteError):
            take_steering(form, "application/x-www-form-urlencoded")
    assert take_steering(b"model=steering", "application/x-www-form-urlencoded") is None
    check_fields([("prompt", '{"steering": 1}'), ("timestamp_granularities[]", "word")], "a form")


def test_a_form_that_cannot_be_read_is_refused_if_it_mentions_us() -> None:
    kind = "multipart/form-data; boundary=b"
    with pytest.raises(RouteError, match="can be read"):
        take_steering(b'--c\r\nname="steering"', kind)
    assert take_steering(b"--c\r\n", kind) is None


def test_a_body_that_is_no_json_is_refused_only_if_it_mentions_us() -> None:
    audio = bytes(range(256)) * 8
    assert take_steering(audio) is None
    assert take_steering(b"\0" + audio, "application/octet-stream") is None
    for encoding in ("utf-8", "utf-16", "utf-32"):
        with pytest.raises(RequestError, match="valid JSON"):
            take_steering('{"extra_body": {"steering": '.encode(encoding))


@pytest.mark.parametrize("option", ["background", "use_beam_search"])
def test_an_option_is_found_however_it_is_written(option: str) -> None:
    escaped = "".join(f"\\u{ord(letter):04X}" for letter in option)
    assert is_set(f'{{"{escaped}": true}}'.encode(), option)
    assert is_set(json.dumps({option: 1}).encode("utf-16"), option)
    assert is_set({option: True}, option)
    assert not is_set(json.dumps({"prompt": f'"{option}": true'}).encode(), option)
    assert not is_set(json.dumps({option: False}).encode(), option)


@pytest.mark.parametrize("root", ["", "/api", "/api/", "/a/b"])
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/api/v1/completions", "/api//v1/completions", "/apiv1", "/a/b/v1", "/api"]
)
def test_the_path_is_the_one_that_the_router_matches_wherever_that_finds_a_route(
    root: str, path: str
) -> None:
    matched = get_route_path({"path": path, "root_path": root})
    if matched.startswith("/v1/"):
        assert path_of({"path": path, "root_path": root}) == matched
