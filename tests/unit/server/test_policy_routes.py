from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.types import Receive, Scope, Send

from steerserve.access.principal import SCOPES, Principal
from steerserve.errors import UnavailableError
from steerserve.policy import KnownNames, PolicyChange, PolicyFolder
from steerserve.server.guard import PRINCIPAL
from steerserve.server.policy_routes import add_policy_routes
from tests.unit.policy.documents import accept, document

POLICIES = "/v1/steering/policies"
NO_SCAM = f"{POLICIES}/no-scam"
ALICE = Principal("alice", frozenset(SCOPES))
YAML = {"content-type": "application/yaml"}


@dataclass
class State:
    """What the routes know: a folder, and an audit log that may be full."""

    policies: PolicyFolder | None
    audit_is_full: bool = False
    recorded: list[tuple[PolicyChange, Principal | None]] = field(default_factory=list)
    failed: list[tuple[PolicyChange, Principal | None, str]] = field(default_factory=list)
    names: KnownNames = field(default_factory=lambda: KnownNames(["demo"], ["app"]))

    def record_change(self, change: PolicyChange, principal: Principal | None) -> None:
        if self.audit_is_full:
            raise UnavailableError("expected room in the audit log", at=(), reason="audit")
        self.recorded.append((change, principal))

    def record_failure(self, change: PolicyChange, principal: Principal | None, error: Exception) -> None:
        self.failed.append((change, principal, str(error)))


@pytest.fixture
def state(tmp_path: Path) -> State:
    (tmp_path / "no-scam.yaml").write_bytes(document())
    return State(PolicyFolder(tmp_path, accept, every=0))


def make_app(state: State) -> FastAPI:
    router = APIRouter(prefix="/v1/steering")
    add_policy_routes(router, state)
    app = FastAPI()
    app.include_router(router)
    return app


Ask = Callable[..., httpx.Response]


@pytest.fixture
def send(state: State) -> Ask:
    """`send("PUT", path, content, header=value)`, of the key `alice`."""

    def go(method: str, path: str, content: bytes = b"", **headers: str) -> httpx.Response:
        async def ask() -> httpx.Response:
            app = make_app(state)

            async def asked_by_alice(scope: Scope, receive: Receive, send: Send) -> None:
                await app({**scope, PRINCIPAL: ALICE}, receive, send)

            transport = httpx.ASGITransport(asked_by_alice)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.request(method, path, content=content, headers=YAML | named)

        return asyncio.run(ask())

    return go


def error(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error, which has OpenAI's shape and this status."""
    assert reply.status_code == status, reply.text
    found: dict[str, Any] = reply.json()["error"]
    assert sorted(found) == ["code", "message", "param", "type"]
    assert found["code"] == status
    return found


def test_the_list_shows_every_document_and_what_is_wrong(send: Ask, state: State) -> None:
    assert state.policies
    body = send("GET", POLICIES).json()
    assert (body["object"], body["problem"]) == ("list", None)
    assert body["version"] == state.policies.current().version
    (policy,) = body["data"]
    assert policy == {
        "name": "no-scam",
        "version": 1,
        "mode": "enforce",
        "owner": "safety@example.org",
        "reason": "Ticket 12: never help with scams.",
        "applies": {"scopes": [], "models": [], "routes": []},
        "missing": [],
        "etag": state.policies.current().policies["no-scam"].etag,
        "text": document().decode(),
    }
    (state.policies.path / "bad.yaml").write_text("{")
    assert send("GET", POLICIES).json()["problem"].startswith("bad.yaml: expected YAML")


def test_one_policy_comes_with_its_etag(send: Ask) -> None:
    reply = send("GET", NO_SCAM)
    assert reply.json()["text"] == document().decode()
    assert reply.headers["etag"] == reply.json()["etag"]
    assert (
        "expected the name of a policy in force, got 'no'"
        in error(send("GET", f"{POLICIES}/no"), 404)["message"]
    )


def test_a_policy_is_created_replaced_and_deleted(send: Ask, state: State) -> None:
    created = send("PUT", f"{POLICIES}/new", document("new"), if_none_match="*")
    assert created.status_code == 201
    assert created.json() == {
        "object": "policy.change",
        "name": "new",
        "action": "created",
        "old_version": None,
        "new_version": 1,
        "mode": "enforce",
        "missing": [],
        "etag": created.headers["etag"],
    }
    assert send("GET", f"{POLICIES}/new").headers["etag"] == created.headers["etag"]
    replaced = send("PUT", f"{POLICIES}/new", document("new", version=2), if_match=created.headers["etag"])
    assert (replaced.status_code, replaced.json()["old_version"], replaced.json()["new_version"]) == (
        200,
        1,
        2,
    )
    deleted = send("DELETE", f"{POLICIES}/new", if_match=replaced.headers["etag"])
    assert (deleted.status_code, deleted.json()["action"], deleted.json()["etag"]) == (200, "deleted", None)
    assert "etag" not in deleted.headers
    error(send("GET", f"{POLICIES}/new"), 404)
    assert [(change.action, who) for change, who in state.recorded] == [
        ("created", ALICE),
        ("replaced", ALICE),
        ("deleted", ALICE),
    ]


def test_names_that_nothing_has_are_told_when_they_are_written_and_when_they_are_read(send: Ask) -> None:
    limits = {"models": ["demo", "dmeo"], "scopes": ["key:app", "key:ap"]}
    created = send("PUT", f"{POLICIES}/new", document("new", applies=limits))
    assert created.json()["missing"] == ["key:ap", "dmeo"]
    assert send("GET", f"{POLICIES}/new").json()["missing"] == ["key:ap", "dmeo"]


def test_what_was_read_before_someone_else_changed_it_is_stale(send: Ask, state: State) -> None:
    etag = send("GET", NO_SCAM).headers["etag"]
    assert send("PUT", NO_SCAM, document(version=2), if_match=etag).status_code == 200
    assert error(send("PUT", NO_SCAM, document(version=3), if_match=etag), 412)["param"] == "$.headers"
    error(send("DELETE", NO_SCAM, if_match=etag), 412)
    assert "expected `If-Match`" in error(send("PUT", NO_SCAM, document(version=3)), 412)["message"]
    assert "expected `If-Match`" in error(send("DELETE", NO_SCAM), 412)["message"]
    assert len(state.recorded) == 1


def test_a_wrong_document_is_named_by_its_field(send: Ask, state: State) -> None:
    refused = error(send("PUT", NO_SCAM, document(version=2, mode="maybe"), if_match="*"), 400)
    assert refused["param"] == "$.mode"
    assert error(send("PUT", NO_SCAM, document(version=1), if_match="*"), 400)["param"] == "$.version"
    assert error(send("PUT", NO_SCAM, document("other"), if_match="*"), 400)["param"] == "$.name"
    error(send("PUT", NO_SCAM, b"\xff"), 400)
    error(send("PUT", NO_SCAM), 400)
    assert state.recorded == []


@pytest.mark.parametrize("kind", ["application/yaml", "text/plain; charset=utf-8", "Text/YAML"])
def test_a_document_is_taken_as_yaml_or_plain_text(send: Ask, kind: str) -> None:
    assert send("PUT", NO_SCAM, document(version=2), if_match="*", content_type=kind).status_code == 200


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", ""])
def test_a_document_of_another_type_is_refused(send: Ask, kind: str) -> None:
    refused = error(send("PUT", NO_SCAM, document(version=2), if_match="*", content_type=kind), 400)
    assert "expected the policy as application/yaml" in refused["message"]


def test_a_document_that_is_too_large_is_refused(send: Ask) -> None:
    assert "at most 262144 bytes" in error(send("PUT", NO_SCAM, b"#" * 262_145), 400)["message"]


@pytest.mark.parametrize(
    ("method", "path", "content", "headers"),
    [
        ("PUT", NO_SCAM, document(version=2), {"if_match": "*"}),
        ("PUT", f"{POLICIES}/new", document("new"), {}),
        ("DELETE", NO_SCAM, b"", {"if_match": "*"}),
    ],
)
def test_a_change_that_cannot_be_audited_is_not_made(
    send: Ask, state: State, method: str, path: str, content: bytes, headers: dict[str, str], tmp_path: Path
) -> None:
    state.audit_is_full = True
    refused = error(send(method, path, content, **headers), 503)
    assert "expected room in the audit log" in refused["message"]
    assert [(one["name"], one["version"]) for one in send("GET", POLICIES).json()["data"]] == [("no-scam", 1)]
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.yaml")} == {"no-scam.yaml": document()}
    state.audit_is_full = False
    assert send(method, path, content, **headers).is_success
    assert len(state.recorded) == 1


@pytest.mark.parametrize(("method", "content"), [("PUT", document(version=2)), ("DELETE", b"")])
def test_a_change_that_is_audited_but_cannot_be_written_is_not_made_and_said_not_to_be(
    send: Ask, state: State, method: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise UnavailableError("expected room for policies", at=(), reason="io")

    monkeypatch.setattr("steerserve.policy.folder.write_file", full)
    monkeypatch.setattr("steerserve.policy.folder.remove_file", full)
    error(send(method, NO_SCAM, content, if_match="*"), 503)
    assert send("GET", NO_SCAM).json()["version"] == 1
    ((recorded, who),) = state.recorded
    assert state.failed == [(recorded, who, "expected room for policies - at $")]


def test_a_folder_that_is_read_only_says_so(send: Ask, tmp_path: Path) -> None:
    (tmp_path / "no-scam.yaml").rename(tmp_path / "file")
    (tmp_path / "no-scam.yaml").symlink_to("file")
    put = send("PUT", NO_SCAM, document(version=2), if_match="*")
    for reply in (put, send("DELETE", NO_SCAM, if_match="*")):
        assert error(reply, 405)["type"] == "MethodNotAllowedError"
        assert reply.headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", POLICIES), ("GET", NO_SCAM), ("PUT", NO_SCAM), ("DELETE", NO_SCAM)]
)
def test_without_a_folder_there_are_no_policies(send: Ask, state: State, method: str, path: str) -> None:
    state.policies = None
    assert "none is configured here" in error(send(method, path), 404)["message"]


def test_the_openapi_document_names_the_body_and_every_status(state: State) -> None:
    paths = make_app(state).openapi()["paths"]
    put, delete, get = (paths[f"{POLICIES}/{{name}}"][method] for method in ("put", "delete", "get"))
    assert set(put["requestBody"]["content"]) == {"application/yaml", "text/plain"}
    assert {"200", "201", "400", "401", "403", "404", "405", "412", "503"} <= set(put["responses"])
    assert {"200", "400", "401", "403", "404", "405", "412", "503"} <= set(delete["responses"])
    assert {"200", "401", "403", "404"} <= set(get["responses"])
    assert {one["name"] for one in put["parameters"]} == {"name", "if-match", "if-none-match"}
