"""What takes force is on record before, with the real audit log and a disk that is full now and then."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from steerserve.audit import AuditLog, verify
from steerserve.audit.appender import Appender
from steerserve.catalog import Catalog
from steerserve.policy.enforcement import Caller, Enforcement
from steerserve.server.policy_routes import add_policy_routes
from steerserve.server.recorder import Recorder
from steerserve.server.state import SteeringState
from tests.unit.policy.documents import document

P = "/v1/steering/policies/p"
CLAMP = [{"feature": 9, "op": "clamp", "value": 0.0}]


class Disk:
    """Of the audit log."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        write = Appender._write

        def writing(appender: Appender, content: bytes) -> None:
            if self.is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(appender, content)

        monkeypatch.setattr(Appender, "_write", writing)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def state(catalog: Catalog, tmp_path: Path, disk: Disk) -> Iterator[SteeringState]:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "p.yaml").write_bytes(document("p", interventions=CLAMP))
    sources = {key: replace(source, identify=key) for key, source in catalog.sources.items()}
    own = replace(catalog, policy_rows=64, sources=sources)
    recorder = Recorder(AuditLog(tmp_path / "audit", fsync="never"), own)
    enforcement = Enforcement(tmp_path / "policies", own, every=0)
    enforcement.folder.record = recorder.enforcing
    yield SteeringState(own, enforcement=enforcement, recorder=recorder)
    recorder.close()


def send(state: SteeringState, method: str, content: bytes = b"") -> httpx.Response:
    router, app = APIRouter(prefix="/v1/steering"), FastAPI()
    add_policy_routes(router, state)
    app.include_router(router)
    head = {"content-type": "application/yaml", "if-match": "*"}

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            return await client.request(method, P, content=content, headers=head)

    return asyncio.run(go())


def said(state: SteeringState, audit: Path) -> list[str]:
    """The details of what is on record of policies."""
    assert state.recorder.log is not None
    lines = [line for file in sorted(audit.glob("audit-*.jsonl")) for line in file.read_text().splitlines()]
    return [record["detail"] for record in map(json.loads, lines) if record["event"] == "policy"]


def mode(state: SteeringState) -> list[str]:
    assert state.enforcement is not None
    return [policy.mode for policy in state.enforcement.current().applying(Caller()).alone.policies]


OFF = document("p", version=2, mode="off", interventions=CLAMP)


@pytest.mark.parametrize(("method", "content"), [("PUT", OFF), ("DELETE", b"")])
def test_a_change_over_http_is_refused_while_the_disk_is_full(
    state: SteeringState, tmp_path: Path, disk: Disk, method: str, content: bytes
) -> None:
    disk.is_full = True
    reply = send(state, method, content)
    assert reply.status_code == 503
    assert "expected to audit a change before it is made" in reply.json()["error"]["message"]
    assert mode(state) == ["enforce"]
    assert said(state, tmp_path / "audit") == []
    disk.is_full = False
    assert send(state, method, content).is_success
    assert mode(state) == []
    action = {"PUT": "replaced 1 -> 2", "DELETE": "deleted 1 -> None"}[method]
    (detail,) = said(state, tmp_path / "audit")
    assert state.enforcement is not None
    assert detail.startswith(action)
    assert detail.endswith(f"in force: {state.enforcement.current().version}")
    assert verify(tmp_path / "audit").ok


def test_a_change_of_the_folder_waits_until_the_disk_has_room(
    state: SteeringState, tmp_path: Path, disk: Disk
) -> None:
    disk.is_full = True
    (tmp_path / "policies" / "p.yaml").write_bytes(OFF)
    assert mode(state) == mode(state) == ["enforce"]
    assert state.policies is not None
    assert "expected to audit a change before it is made" in (state.policies.problem or "")
    disk.is_full = False
    assert mode(state) == []
    assert state.policies.problem is None
    assert state.enforcement is not None
    assert said(state, tmp_path / "audit") == [f"in force: {state.enforcement.current().version}"]


def test_a_change_that_could_not_be_written_is_on_record_as_not_made(
    state: SteeringState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("steerserve.policy.files._write_through", full)
    assert send(state, "PUT", OFF).status_code == 503
    assert mode(state) == ["enforce"]
    state.recorder.close()
    first, second = said(state, tmp_path / "audit")
    assert first.startswith("replaced 1 -> 2")
    assert second.startswith("not replaced, 1 stays: expected the folder of policies to take the change")
