import json

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from steerserve.errors import RouteError
from steerserve.server.events import error_in, final_event, splice, with_report
from steerserve.server.routes import build_router
from steerserve.server.routing import check_route, path_of, served
from steerserve.server.state import SteeringState


@pytest.mark.parametrize(
    ("path", "root", "found"),
    [
        ("/v1/completions", "", "/v1/completions"),
        ("/api/v1/completions", "/api", "/v1/completions"),
        ("/api/v1/completions", "/api/", "/v1/completions"),
        ("/v1/completions", "/api", "/v1/completions"),
        ("/apiv1/completions", "/api", "/apiv1/completions"),
    ],
)
def test_a_path_is_matched_without_the_servers_prefix(path: str, root: str, found: str) -> None:
    assert path_of({"path": path, "root_path": root}) == found


@pytest.mark.parametrize(
    "path", ["/tokenize", "/v1/completions/", "/v1/completions/render", "/V1/completions", "/"]
)
def test_a_route_that_is_not_known_to_carry_steering_is_refused(path: str) -> None:
    with pytest.raises(RouteError):
        check_route(path)


def test_only_post_routes_of_the_app_count_as_served() -> None:
    app = FastAPI()
    app.post("/v1/completions")(lambda: None)
    app.get("/v1/messages")(lambda: None)
    app.post("/v1/{anything}")(lambda: None)
    assert served(app.routes[-3:-1]) == ("/v1/completions",)


def test_a_report_is_spliced_into_an_object_and_nothing_else() -> None:
    assert json.loads(splice(b'{"a": 1.10 }\n', {"b": 2})) == {"a": 1.1, "steering": {"b": 2}}
    assert splice(b"{}", {"b": 2}) == b'{"steering":{"b":2}}'
    assert splice(b"[1]", {"b": 2}) == b"[1]"


def test_text_that_looks_like_a_last_event_is_not_one() -> None:
    assert final_event(b'data: {"text": "data: [DONE]"}\n\n') is None
    assert final_event(b'data: {"text": "\\ndata: [DONE]"}\n\ndata: [DONE]\n\n') == 34


def test_a_report_follows_no_error() -> None:
    done = b"data: [DONE]\n\n"
    assert with_report(done, {"b": 2}, b'data: {"error": {"message": "x"}}\n\n') == done


def test_an_error_is_found_among_events() -> None:
    assert error_in(b'data: {"a": 1}\n\ndata: {"error": {"code": 400}}\n\n') == {"error": {"code": 400}}
    assert error_in(b'data: {"text": "\\"error\\""}\n\ndata: {"error"\n\n') is None


def test_an_empty_server_says_that_nothing_is_configured() -> None:
    app = FastAPI()
    app.include_router(build_router(SteeringState()))
    client = TestClient(app)
    assert client.get("/v1/steering/health").json()["status"] == "not_configured"
    assert client.get("/v1/steering/saes").json() == {"object": "list", "data": []}
    assert client.get("/v1/steering/directions").json() == {"object": "list", "data": []}
    assert client.get("/v1/steering/capabilities").json()["routes"] == []
