"""Requests under policies, by keys, on the audit log: what the middleware does with and without an engine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, StreamingResponse

from steerserve.access.principal import Principal
from steerserve.audit import AuditLog
from steerserve.carried import CARRIED
from steerserve.catalog import Catalog
from steerserve.errors import UnavailableError
from steerserve.policy.enforcement import Enforcement
from steerserve.server.collector import ReportCollector
from steerserve.server.middleware import SteeringMiddleware
from steerserve.server.recorder import Recorder
from steerserve.server.state import SteeringState

from .conftest import CHUNK, STEERING, Client, Engine, event

DONE = event("[DONE]")
HELD = {"interventions": [{"feature": 9, "op": "clamp", "value": 2.0}]}


def write(folder: Path, mode: str = "enforce", **fields: Any) -> None:
    document = {"name": "p", "version": 3, "mode": mode, "owner": "o", "reason": "because", **fields}
    document.setdefault("interventions", [{"feature": 9, "op": "clamp", "value": 0.0}])
    document.setdefault("watch", [{"name": "w", "feature": 11, "above": 1.5}])
    folder.mkdir(exist_ok=True)
    (folder / "p.yaml").write_text(json.dumps(document), encoding="utf-8")


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    return tmp_path / "audit"


@pytest.fixture
def state(state: SteeringState, catalog: Catalog, tmp_path: Path, audit: Path) -> Any:
    write(tmp_path / "policies")
    state.enforcement = Enforcement(tmp_path / "policies", catalog, every=0)
    state.recorder = Recorder(AuditLog(audit, fsync="never"), catalog)
    yield state
    state.recorder.close()


@pytest.fixture
def catalog(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    from dataclasses import replace

    monkeypatch.setattr("steerserve.policy.compiled._check_holdable", lambda *_: None)
    sources = {key: replace(source, identify="f" * 32) for key, source in catalog.sources.items()}
    return replace(catalog, policy_rows=64, sources=sources)


def records(audit: Path) -> list[dict[str, Any]]:
    lines = [
        json.loads(line)
        for file in sorted(audit.glob("audit-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    return [line for line in lines if line["event"] == "request"]


def test_a_request_that_asks_for_nothing_is_held_and_on_record_and_keeps_its_bytes(
    post: Client, engine: Engine, audit: Path
) -> None:
    reply = post(
        "/v1/completions",
        b'{ "prompt": "p" }',
        x_request_id="r-1",
        traceparent=f"00-{'ab' * 16}-{'cd' * 8}-01",
    )
    assert engine.bodies == [b'{ "prompt": "p" }']
    assert reply.content == b'{"id":"x","choices":[]}'
    (carried,) = engine.seen
    assert carried is not None
    assert carried.merged.plan is not None
    assert [row.effect for row in carried.merged.plan.rows] == ["force", "observe"]
    (line,) = records(audit)
    assert (line["request_id"], line["trace_id"], line["principal"]) == ("r-1", "ab" * 16, "anyone")
    assert (line["outcome"], line["status"], line["route"]) == ("ok", 200, "/v1/completions")
    assert line["policies"] == [{"mode": "enforce", "name": "p", "version": 3}]
    assert line["plan"] == carried.merged.plan.digest
    assert line["saes"] == {"sae:demo": "f" * 32}
    assert line["tokens"] == 4
    assert line["watched"] == {"p/w": {"above": 1.5, "fired": 0, "max": 1.0, "tokens": 4}}


def test_a_report_names_the_policies_and_what_they_saw(post: Client) -> None:
    report = post("/v1/completions", {"steering": STEERING}).json()["steering"]
    seen = {"name": "w", "tokens": 4, "fired": 4, "above": 0, "max": 1.0}
    assert report["policies"] == [
        {"name": "p", "version": 3, "mode": "enforce", "tokens": 4, "watch": [seen]}
    ]
    assert [entry["feature"] for entry in report["interventions"]] == [5]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_conflict_is_a_403_that_names_the_policy(post: Client, audit: Path, path: str) -> None:
    reply = post(path, {"steering": HELD}, chunks=[event(CHUNK), event(CHUNK), DONE])
    assert reply.status_code == 403
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("policy_conflict", 403)
    assert error["param"] == "$.steering.interventions[0]"
    assert "`p` holds: because" in error["message"]
    assert [(line["outcome"], line["reason"]) for line in records(audit)] == [("refused", "policy_conflict")]


def test_a_stream_is_on_record_before_it_ends_and_keeps_its_bytes(post: Client, audit: Path) -> None:
    chunks = [event(CHUNK), event(CHUNK), DONE]
    assert post("/v1/chat/completions", {"stream": True}, chunks=chunks).content == b"".join(chunks)
    assert [line["outcome"] for line in records(audit)] == ["ok"]


def test_what_a_condition_ended_is_on_record_as_aborted(
    post: Client, engine: Engine, tmp_path: Path, audit: Path
) -> None:
    write(tmp_path / "policies", interventions=[{"then": "abort", "when": {"feature": 9, "above": 1}}])
    engine.since = 7
    post("/v1/completions", {})
    assert [line["outcome"] for line in records(audit)] == ["aborted"]


def test_what_failed_and_what_was_refused_is_on_record(post: Client, audit: Path) -> None:
    post("/v1/responses", {"steering": STEERING})
    post("/v1/completions", {"steering": {"interventions": 1}})
    found = [(line["outcome"], line["status"], line["reason"]) for line in records(audit)]
    assert found == [("failed", 404, None), ("refused", 400, "malformed")]


@pytest.mark.parametrize(("mode", "status"), [("enforce", 503), ("shadow", 200)])
def test_a_log_that_cannot_be_written_refuses_what_is_enforced(
    post: Client, engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, status: int
) -> None:
    write(tmp_path / "policies", mode)
    # The writer itself tries again, and would find room.
    monkeypatch.setattr(Recorder, "problem", property(lambda _: "expected room on the disk"))
    reply = post("/v1/completions", {})
    assert reply.status_code == status
    assert len(engine.seen) == (0 if status == 503 else 1)


def test_a_reply_that_could_not_be_recorded_is_not_given(
    post: Client, state: SteeringState, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = state.recorder.log
    assert log is not None
    log.close()
    reply = post("/v1/completions", {})
    assert reply.status_code == 503
    assert reply.json()["error"]["type"] == "ServiceUnavailableError"
    stream = [event(CHUNK), event(CHUNK), DONE]
    with pytest.raises(UnavailableError, match="audit"):
        post("/v1/chat/completions", {"stream": True}, chunks=stream)


def test_beam_search_is_refused_only_where_positions_matter(post: Client, tmp_path: Path) -> None:
    change = {"feature": 9, "op": "clamp", "value": 0.0}
    write(tmp_path / "policies", interventions=[{**change, "where": {"special_tokens": True}}], watch=[])
    assert post("/v1/completions", {"use_beam_search": True}).status_code == 200
    write(tmp_path / "policies", interventions=[{**change, "where": {"phase": "generation"}}])
    reply = post("/v1/completions", {"use_beam_search": True})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "$.use_beam_search")


def test_a_policy_is_written_in_peace(state: SteeringState) -> None:
    """A document may speak of "steering"; the policy routes read YAML, not requests."""
    import asyncio

    import httpx
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def put(request: Request) -> PlainTextResponse:
        return PlainTextResponse(await request.body())

    app = Starlette(routes=[Route("/v1/steering/policies/p", put, methods=["PUT"])])

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(SteeringMiddleware(app, state))
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            return await client.put("/v1/steering/policies/p", content=b'reason: "steering" is mentioned')

    assert asyncio.run(go()).text == 'reason: "steering" is mentioned'


@pytest.mark.parametrize(
    ("limits", "said"),
    [(None, "scope `steer`"), ({"max_value": 1.0}, "max_value"), ({"ops": ["ablate"]}, "ops")],
)
def test_a_key_steers_within_its_scopes_and_limits(
    post: Client, monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any] | None, said: str
) -> None:
    from steerserve.access.limits import Limits

    scopes = frozenset({"infer"} if limits is None else {"infer", "steer"})
    principal = Principal("app", scopes, Limits.model_validate(limits or {}))
    monkeypatch.setattr("steerserve.server.middleware.principal_of", lambda scope: principal)
    reply = post("/v1/completions", {"steering": STEERING})
    assert reply.status_code == 403
    assert said in reply.json()["error"]["message"]
    assert post("/v1/completions", {}).status_code == 200


def test_what_two_policies_agree_on_is_reported_of_both(post: Client, tmp_path: Path) -> None:
    document = json.loads((tmp_path / "policies" / "p.yaml").read_text()) | {"name": "q", "watch": []}
    (tmp_path / "policies" / "q.yaml").write_text(json.dumps(document), encoding="utf-8")
    report = post("/v1/completions", {"steering": STEERING}).json()["steering"]
    assert [(entry["name"], entry["tokens"]) for entry in report["policies"]] == [("p", 4), ("q", 4)]


def test_a_client_that_leaves_while_its_stream_waits_for_the_record_is_on_record(
    state: SteeringState, engine: Engine, audit: Path
) -> None:
    """Whoever serves the app ends it as soon as the client is gone."""
    counting, counted = asyncio.Event(), asyncio.Event()

    class SlowCollector(ReportCollector):
        async def collect(self, ticket: str, ends: dict[str, int] | None = None) -> Any:
            counting.set()
            await counted.wait()
            return await super().collect(ticket, ends)

    assert state.collector is not None
    state.collector = SlowCollector(state.collector._rpc)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        engine.take((await receive())["body"])
        await StreamingResponse(iter([event(CHUNK), DONE]), media_type="text/event-stream")(
            {**scope, "asgi": {"spec_version": "2.4"}}, receive, send
        )

    async def receive() -> Any:
        return {"type": "http.request", "body": b'{"prompt": "p"}'}

    async def send(message: Any) -> None:
        pass

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions", "root_path": ""}
    scope |= {"headers": [(b"content-type", b"application/json")], "query_string": b""}

    async def leave() -> None:
        serving = asyncio.create_task(SteeringMiddleware(app, state)(scope, receive, send))
        await counting.wait()
        serving.cancel()
        # The end of the request waits for what must be on record, which is not there yet.
        await asyncio.sleep(0)
        counted.set()
        with pytest.raises(asyncio.CancelledError):
            await serving

    asyncio.run(leave())
    assert [(line["outcome"], line["tokens"]) for line in records(audit)] == [("ok", 4)]


def test_a_client_that_leaves_before_a_whole_reply_is_on_record_as_one_that_left(
    state: SteeringState, engine: Engine, audit: Path
) -> None:
    """vLLM answers such a client with an empty reply, and ends its requests a moment later."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        carried = CARRIED.get()
        assert carried is not None
        engine.take((await receive())["body"])
        carried.ends.begin("r")
        assert (await receive())["type"] == "http.disconnect"
        asyncio.get_running_loop().call_later(0.05, carried.ends.end, "r", 7)
        await JSONResponse(None)(scope, receive, send)

    messages = iter([{"type": "http.request", "body": b'{"prompt": "p"}'}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        pass

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions", "root_path": ""}
    scope |= {"headers": [(b"content-type", b"application/json")], "query_string": b""}
    asyncio.run(SteeringMiddleware(app, state)(scope, receive, send))
    (carried,) = engine.seen
    assert carried is not None
    assert engine.asked == [{carried.ticket: {"r": 7}}]
    (line,) = records(audit)
    assert (line["outcome"], line["tokens"]) == ("left", 4)
