from __future__ import annotations

import json
from typing import Any

import pytest
from starlette._utils import get_route_path

from steerserve.errors import RouteError
from steerserve.server.body import is_set, take_steering
from steerserve.server.places import check_head, check_places
from steerserve.server.routing import path_of

ASKED: dict[str, Any] = {"interventions": []}


def scope(path: str = "/v1/completions", query: bytes = b"", **headers: str) -> dict[str, Any]:
    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "path": path, "query_string": query, "headers": lines}


@pytest.mark.parametrize(
    "head",
    [
        scope("/v1/completions\n"),
        scope(query=b"steering=1"),
        scope(query=b"a=1&steerin%67"),
        scope(steering="{}"),
        scope(content_encoding="gzip"),
        scope(content_encoding="identity, br"),
    ],
)
def test_what_stands_in_a_requests_head_to_be_passed_over_is_refused(head: dict[str, Any]) -> None:
    with pytest.raises(RouteError, match="expected"):
        check_head(head)


@pytest.mark.parametrize(
    "head",
    [scope(), scope(query=b"q=steering&x"), scope(content_encoding=" Identity "), scope(x_steering="1")],
)
def test_any_other_head_passes(head: dict[str, Any]) -> None:
    check_head(head)


@pytest.mark.parametrize(
    ("document", "at"),
    [
        ({"extra_body": {"steering": ASKED}}, "$.extra_body.steering"),
        ({"extra_args": {"steering": ASKED}}, "$.extra_args.steering"),
        ({"sampling_params": {"steering": ASKED}}, "$.sampling_params.steering"),
        ({"sampling_params": {"extra_args": {"steering": 1}}}, "$.sampling_params.extra_args.steering"),
        ({"messages": [{}, {"role": "user", "steering": ASKED}]}, "$.messages[1].steering"),
        ({"messages": [[{}], [{}, {"steering": ASKED}]]}, "$.messages[1][1].steering"),
        ({"input": [{"steering": ASKED}]}, "$.input[0].steering"),
    ],
)
def test_steering_where_no_route_reads_it_is_refused_by_its_place(document: dict[str, Any], at: str) -> None:
    with pytest.raises(RouteError) as caught:
        take_steering(json.dumps(document).encode(), "application/json", "/v1/completions")
    assert caught.value.param == at


@pytest.mark.parametrize(
    ("path", "document"),
    [
        ("/v1/completions", {"vllm_xargs": {"steering": "{}"}}),
        ("/v1/chat/completions/render", {"vllm_xargs": {"steering": "{}"}}),
        ("/inference/v1/generate", {"sampling_params": {"extra_args": {"steering": ASKED}}}),
        ("/v1/completions", {"messages": [{"content": [{"steering": 1}]}], "metadata": {"steering": "x"}}),
        ("/v1/completions", {"messages": {"steering": 1}, "input": "steering", "extra_body": ["steering"]}),
    ],
)
def test_what_a_route_reads_or_a_client_says_passes(path: str, document: dict[str, Any]) -> None:
    check_places(document, path)


@pytest.mark.parametrize("path", ["/generative_scoring", "/inference/v1/generate", "/tokenize"])
def test_xargs_of_a_route_that_reads_none_are_refused(path: str) -> None:
    with pytest.raises(RouteError, match="nothing reads it there"):
        check_places({"vllm_xargs": {"steering": "{}"}}, path)


def test_a_form_written_as_a_query_cannot_carry_steering() -> None:
    with pytest.raises(RouteError, match="in a form"):
        take_steering(b"model=m&steering=%7B%7D", "application/x-www-form-urlencoded")
    assert take_steering(b"model=steering", "application/x-www-form-urlencoded") is None


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
