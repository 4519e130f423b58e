from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import Message, Scope
from starlette.websockets import WebSocket, WebSocketDisconnect

from steerserve.access.hashing import Cost, hash_secret
from steerserve.access.key_entry import KeyEntry
from steerserve.access.key_file import change_key_file
from steerserve.access.key_text import KeyText
from steerserve.access.keyring import KeyRing
from steerserve.access.principal import ANYONE, NOBODY, SCOPES, SERVER_KEY, Principal
from steerserve.errors import RequestError
from steerserve.server import guard
from steerserve.server.guard import PRINCIPAL, KeyGuard, principal_of

CHEAP = Cost(n=2**10, r=1, p=1)
SERVER_TEXT = "the-server's-own"
ROUTES = {
    "infer": ("POST", "/v1/completions"),
    "inspect": ("GET", "/v1/steering/saes"),
    "admin": ("PUT", "/v1/steering/policies/a"),
}


@dataclass
class State:
    keys: KeyRing | None = None
    server_keys: tuple[str, ...] = ()
    turned_away: list[str] = field(default_factory=list)

    def denied(self, scope: Any, error: RequestError) -> None:
        self.turned_away.append(error.reason)


def key_of(name: str) -> KeyText:
    return KeyText(hashlib.sha256(name.encode()).hexdigest()[:12], "s" * 43)


def make_entry(name: str, **fields: Any) -> KeyEntry:
    key, salt = key_of(name), b"\x07" * 16
    digest = hash_secret(key.secret, salt, CHEAP).hex()
    made = {"id": key.id, "name": name, "created": datetime.now(UTC), "salt": salt.hex(), "hash": digest}
    return KeyEntry.model_validate({**made, **CHEAP._asdict(), **fields})


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> KeyRing:
    """A key for each scope under its name, one that expired, one held to two requests a minute."""
    path = tmp_path_factory.mktemp("guard") / "keys.yaml"
    entries = [
        *(make_entry(scope, scopes=[scope]) for scope in SCOPES),
        make_entry("late", scopes=list(SCOPES), expires="2020-01-01T00:00:00Z"),
        make_entry("slow", scopes=["infer"], limits={"requests_per_minute": 2}),
    ]
    change_key_file(path, lambda _: tuple(entries), create=True)
    return KeyRing(path)


def make_app() -> Starlette:
    """Answers with the name of the principal."""

    async def who(request: Request) -> Response:
        return JSONResponse({"principal": principal_of(request.scope).name})

    async def session(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(principal_of(socket.scope).name)
        await socket.close()

    paths = ["/health", "/tokenize", "/v1/load_lora_adapter", "/v1/messages", "/cohere/v2/chat", "/unknown"]
    paths += [path for _, path in ROUTES.values()]
    methods = ["GET", "HEAD", "POST", "PUT", "OPTIONS"]
    routes = [Route(path, who, methods=methods) for path in paths]
    return Starlette(routes=[*routes, WebSocketRoute("/v1/realtime", session)])


Ask = Callable[..., httpx.Response]


@pytest.fixture
def state(ring: KeyRing) -> State:
    return State(ring)


@pytest.fixture
def ask(state: State) -> Ask:
    """`ask("POST", "/v1/completions", "infer")`: with the key of that name."""
    app = KeyGuard(make_app(), state)

    def send(method: str, path: str, name: str | None = None, **headers: str) -> httpx.Response:
        given = {} if name is None else {"authorization": f"Bearer {key_of(name)}"}
        given |= {key.replace("_", "-"): value for key, value in headers.items()}

        async def go() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
                return await client.request(method, path, headers=given)

        return asyncio.run(go())

    return send


@pytest.mark.parametrize("needed", ROUTES)
@pytest.mark.parametrize("name", SCOPES)
def test_a_route_takes_the_key_with_its_scope_and_no_other(ask: Ask, needed: str, name: str) -> None:
    reply = ask(*ROUTES[needed], name)
    if name == needed:
        assert (reply.status_code, reply.json()) == (200, {"principal": name})
        return
    method, path = ROUTES[needed]
    assert reply.status_code == 403
    assert reply.json()["error"] == {
        "message": f"expected a key with scope `{needed}` for {method} {path}, got `{name}` with {name}"
        " - at $",
        "type": "PermissionDeniedError",
        "param": "$",
        "code": 403,
    }


@pytest.mark.parametrize(("method", "path"), [*ROUTES.values(), ("GET", "/unknown"), ("POST", "/tokenize")])
def test_without_a_key_every_guarded_route_answers_401(ask: Ask, method: str, path: str) -> None:
    reply = ask(method, path)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == (
        "AuthenticationError",
        "$.headers.authorization",
        401,
    )


def test_an_unknown_and_an_expired_key_answer_401_and_say_which(ask: Ask) -> None:
    unknown = ask("POST", "/v1/completions", "nobody-has-it")
    expired = ask("POST", "/v1/completions", "late")
    assert unknown.status_code == expired.status_code == 401
    assert "an unknown key" in unknown.json()["error"]["message"]
    assert "key `late`, which expired at 2020-01-01" in expired.json()["error"]["message"]


def test_a_refusal_has_the_shape_of_the_routes_own_api(ask: Ask) -> None:
    assert ask("POST", "/v1/messages").json()["type"] == "error"
    assert "message" in ask("POST", "/cohere/v2/chat").json()


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {key_of('infer')}"},
        {"authorization": f"bearer {key_of('infer')}"},
        {"authorization": f"BEARER  {key_of('infer')} "},
        {"x_api_key": f"{key_of('infer')}"},
        {"x_api_key": f"{key_of('infer')}", "authorization": "Basic dTpw"},
        {"x_api_key": f"{key_of('infer')}", "authorization": "Bearer "},
        {"x_api_key": f"{key_of('admin')}", "authorization": f"Bearer {key_of('infer')}"},
    ],
)
def test_a_key_comes_as_bearer_or_else_as_x_api_key(ask: Ask, headers: dict[str, str]) -> None:
    assert ask("POST", "/v1/completions", **headers).json() == {"principal": "infer"}


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", f"Basic {key_of('infer')}", str(key_of("infer")), f"Bearer {key_of('infer')}x"],
)
def test_any_other_authorization_is_no_key(ask: Ask, value: str) -> None:
    assert ask("POST", "/v1/completions", authorization=value).status_code == 401


def test_a_wrong_bearer_is_not_made_good_by_the_other_header(ask: Ask) -> None:
    reply = ask("POST", "/v1/completions", "unknown", x_api_key=str(key_of("infer")))
    assert reply.status_code == 401


@pytest.mark.parametrize("name", [None, "unknown", "late"])
def test_a_probe_needs_no_key_and_minds_no_bad_one(ask: Ask, name: str | None) -> None:
    reply = ask("GET", "/health", name)
    assert (reply.status_code, reply.json()) == (200, {"principal": "nobody"})


def test_a_browsers_question_before_the_request_needs_no_key(ask: Ask) -> None:
    assert ask("OPTIONS", "/v1/completions").json() == {"principal": "nobody"}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/load_lora_adapter",
        "/v1/load_lora_adapter%0A",
        "//v1/completions",
        "/health/",
        "/v1/completions%0A",
    ],
)
def test_no_spelling_of_a_path_goes_round_the_guard(ask: Ask, path: str) -> None:
    assert ask("POST", path).status_code == 401
    for name in ("infer", "steer", "inspect"):
        assert ask("POST", path, name).status_code == 403


def test_the_host_header_and_an_absolute_target_decide_nothing(ask: Ask) -> None:
    reply = ask("PUT", "/v1/steering/policies/a", "infer", host="t/health", x_forwarded_prefix="/health")
    assert reply.status_code == 403
    assert ask("POST", "/v1/load_lora_adapter?/health", "infer").status_code == 403


def test_beyond_its_requests_a_minute_a_key_answers_429_and_when_to_come_back(ask: Ask) -> None:
    statuses = [ask("POST", "/v1/completions", "slow").status_code for _ in range(2)]
    reply = ask("POST", "/v1/completions", "slow")
    assert [*statuses, reply.status_code] == [200, 200, 429]
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert reply.json()["error"]["type"] == "RateLimitError"
    assert ask("POST", "/v1/completions", "infer").status_code == 200


def test_only_what_runs_the_model_counts(ask: Ask) -> None:
    assert [ask("POST", "/tokenize", "slow").status_code for _ in range(4)] == [200] * 4
    assert ask("POST", "/v1/completions", "slow").status_code == 200


def test_a_request_that_is_refused_does_not_count(ask: Ask) -> None:
    for _ in range(4):
        assert ask("PUT", "/v1/steering/policies/a", "slow").status_code == 403
    assert ask("POST", "/v1/completions", "slow").status_code == 200


def test_too_many_new_keys_answer_503_and_when_to_come_back(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerserve.access.keyring.MAX_WAITING", 0)
    reply = ask("POST", "/v1/completions", "never-seen")
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"


@pytest.mark.parametrize("state", [State()])
def test_without_keys_everyone_is_anyone(ask: Ask) -> None:
    for method, path in [*ROUTES.values(), ("POST", "/v1/load_lora_adapter"), ("GET", "/health")]:
        assert ask(method, path).json() == {"principal": "anyone"}
    assert ask("POST", "/v1/completions", "unknown").status_code == 200


@pytest.mark.parametrize("with_keys", [True, False])
def test_the_servers_own_key_may_do_everything(ask: Ask, state: State, with_keys: bool) -> None:
    state.server_keys = ("another", SERVER_TEXT)
    state.keys = state.keys if with_keys else None
    for method, path in [*ROUTES.values(), ("POST", "/v1/load_lora_adapter")]:
        reply = ask(method, path, authorization=f"Bearer {SERVER_TEXT}")
        assert reply.json() == {"principal": "api-key"}
    assert SERVER_KEY.scopes == set(SCOPES)


@pytest.mark.parametrize("text", ["", "the-server", "the-server's-own ", "THE-SERVER'S-OWN", "x"])
def test_what_is_not_wholly_the_servers_key_is_none(ask: Ask, state: State, text: str) -> None:
    state.server_keys = (SERVER_TEXT,)
    reply = ask("POST", "/v1/completions", authorization=f"Bearer {text}x")
    assert reply.status_code == 401


def test_the_servers_key_guards_the_routes_that_its_own_check_leaves_out(ask: Ask, state: State) -> None:
    state.keys, state.server_keys = None, (SERVER_TEXT,)
    for path in ("/invocations", "/tokenize", "/v1/completions"):
        assert ask("POST", path).status_code == 401
        assert ask("POST", path, authorization=f"Bearer {SERVER_TEXT}").status_code != 401
    assert ask("GET", "/health").status_code == 200
    assert len(state.turned_away) == 3


def test_all_of_the_servers_keys_are_compared_in_constant_time(
    ask: Ask, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    original = guard.hmac.compare_digest

    def spy(ours: bytes, theirs: bytes) -> bool:
        compared.append(len(theirs))
        return original(ours, theirs)

    monkeypatch.setattr(guard.hmac, "compare_digest", spy)
    state.server_keys = (SERVER_TEXT, "second", "a much longer third one")
    ask("POST", "/v1/completions", authorization=f"Bearer {SERVER_TEXT}")
    assert compared == [32, 32, 32]


def test_a_session_needs_infer_and_is_refused_before_it_is_accepted(state: State) -> None:
    client = TestClient(KeyGuard(make_app(), state))
    with client.websocket_connect("/v1/realtime", headers={"x-api-key": str(key_of("infer"))}) as socket:
        assert socket.receive_text() == "infer"
    for headers in ({}, {"x-api-key": str(key_of("admin"))}):
        with (
            pytest.raises(WebSocketDisconnect) as caught,
            client.websocket_connect("/v1/realtime", headers=headers),
        ):
            pass
        assert caught.value.code == 1008
        assert "expected a key" in caught.value.reason
        assert len(caught.value.reason.encode()) <= 123


def test_a_session_counts_as_one_request(state: State) -> None:
    client = TestClient(KeyGuard(make_app(), state))
    headers = {"x-api-key": str(key_of("slow"))}
    for _ in range(2):
        with client.websocket_connect("/v1/realtime", headers=headers) as socket:
            assert socket.receive_text() == "slow"
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime", headers=headers):
        pass


def test_the_start_and_the_end_of_the_server_pass_untouched(state: State) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, *_: Any) -> None:
        seen.append(scope)

    async def nothing(*_: Any) -> Any:
        raise AssertionError("nothing is sent or received")

    scope = {"type": "lifespan"}
    asyncio.run(KeyGuard(app, state)(scope, nothing, nothing))
    assert seen == [{"type": "lifespan"}]


def test_an_app_without_a_guard_serves_anyone() -> None:
    assert principal_of({}) is ANYONE
    assert principal_of({PRINCIPAL: NOBODY}) is NOBODY


def send_raw(
    state: State, path: str, method: str, headers: list[tuple[bytes, bytes]]
) -> tuple[int, Principal | None]:
    """The status, and the principal that reached the app."""
    seen: list[Principal] = []
    sent: list[Message] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        seen.append(principal_of(scope))
        await JSONResponse({})(scope, receive, send)

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": headers, "root_path": ""}
    asyncio.run(KeyGuard(app, state)(scope, receive, send))
    return sent[0]["status"], seen[0] if seen else None


_HEADER_NAMES = st.sampled_from([b"authorization", b"x-api-key", b"Authorization", b"cookie"])
_HEADER_VALUES = st.binary(max_size=80) | st.builds(
    bytes.__add__, st.sampled_from([b"Bearer ", b"bearer\t", b"Bearer"]), st.binary(max_size=80)
)


@given(
    st.lists(st.tuples(_HEADER_NAMES, _HEADER_VALUES), max_size=4),
    st.text() | st.sampled_from(["/v1/completions", "/v1/steering"]),
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "BREW", ""]),
)
@example([(b"authorization", b"Bearer \xff\x00")], "/v1/completions", "POST")
def test_no_header_and_no_path_makes_a_principal_or_an_exception(
    ring: KeyRing, headers: list[tuple[bytes, bytes]], path: str, method: str
) -> None:
    status, principal = send_raw(State(ring, (SERVER_TEXT,)), path, method, headers)
    assert (status, principal) in {(401, None), (200, NOBODY)}


def test_of_a_header_given_twice_the_first_counts_as_it_does_for_the_server(ring: KeyRing) -> None:
    first, second = (f"Bearer {key_of(name)}".encode() for name in ("infer", "admin"))
    headers = [(b"authorization", first), (b"authorization", second)]
    assert send_raw(State(ring), "/v1/completions", "POST", headers)[0] == 200
    assert send_raw(State(ring), "/v1/load_lora_adapter", "POST", headers)[0] == 403


def test_a_key_that_is_revoked_is_refused_while_the_server_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerserve.access.keyring.CHECK_EVERY", 0.0)
    path = tmp_path / "keys.yaml"
    change_key_file(path, lambda _: (make_entry("team", scopes=["infer"]),), create=True)
    state = State(KeyRing(path))
    headers = [(b"x-api-key", str(key_of("team")).encode())]
    assert send_raw(state, "/v1/completions", "POST", headers)[0] == 200
    change_key_file(path, lambda _: ())
    assert send_raw(state, "/v1/completions", "POST", headers)[0] == 401
