"""Two API servers before one engine: both obey the policies, and each writes an audit log of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from steerserve.audit import verify
from tests.server import conftest as plain
from tests.server.attack.log import verified
from tests.server.attack.running import HELD, Attacked, policy, start
from tests.support.one import OneAtATime

SERVERS = 2
# Seconds that a busy machine may take until every server has looked at the folder again.
PATIENCE = 120.0


@pytest.fixture(scope="module")
def several(running: OneAtATime, tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    words = ("--api-server-count", str(SERVERS))
    return running.get("several", lambda: start(tmp_path_factory.mktemp("several"), *words))


@pytest.fixture(autouse=True)
def _log_on_failure(several: Attacked, request: pytest.FixtureRequest) -> Iterator[None]:
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        print(plain.tail(several.server.log))


def send(several: Attacked, name: str, steering: dict[str, Any], count: int) -> list[httpx.Response]:
    """The same request over connections of their own, which the servers share out among themselves."""
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0.0, "steering": steering}

    def one(number: int) -> httpx.Response:
        head = several.head("user") | {"x-request-id": f"{name}-{number}"}
        return httpx.post(f"{several.server.url}/v1/completions", json=body, headers=head, timeout=120)

    # Several at a time, lest one of the servers be fast enough for all of them.
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(count)))


def writers(several: Attacked, name: str) -> list[int]:
    """How many of the named requests each server's own log holds."""
    found = []
    for path in sorted(several.audit.glob("audit-?*.jsonl")):
        found.append(path.read_bytes().count(f'"request_id":"{name}-'.encode()))
    return found


def policies(reply: httpx.Response) -> set[str]:
    return {entry["name"] for entry in reply.json()["steering"]["policies"]}


def test_both_servers_hold_what_is_held_and_refuse_what_conflicts(several: Attacked) -> None:
    several.observe()
    replies = send(several, "held", {"interventions": []}, 40)
    assert [reply.status_code for reply in replies] == [200] * 40, replies[0].text
    for reply in replies:
        assert policies(reply) == {"hold", "churn", "look"}
    seen = several.rpc("attack_observed")
    assert seen["tokens"] >= 40 * 4
    assert (seen["fired_behind"], seen["exact"], seen["rounded"]) == (0, 0.0, 0.0), seen
    touching = {"interventions": [{"sae": "demo", "feature": HELD[0], "op": "clamp", "value": 9.0}]}
    assert [reply.status_code for reply in send(several, "touch", touching, 20)] == [403] * 20
    assert all(count > 0 for count in writers(several, "held")), writers(several, "held")


def test_a_change_reaches_every_server_and_both_logs_are_sound(several: Attacked) -> None:
    where, head = "/v1/steering/policies/tide", {"content-type": "application/yaml"}
    edit = [{"direction": "french", "op": "add", "value": 0}]
    text = policy("tide", 1, interventions=edit)
    assert several.server.http.put(where, content=text, headers=head).status_code == 201
    deadline = time.monotonic() + PATIENCE
    while not all("tide" in policies(reply) for reply in send(several, "tide", {"interventions": []}, 30)):
        assert time.monotonic() < deadline, "a server did not look at the folder again"
    assert all(count > 0 for count in writers(several, "tide"))
    assert verify(several.audit).ok
    records = [line for line in verified(several.audit) if line["event"] == "request"]
    assert {f"tide-{number}" for number in range(30)} <= {line["request_id"] for line in records}
    assert len({path.name for path in several.audit.glob("audit-?*.jsonl")}) == SERVERS


def test_there_are_as_many_servers_as_asked_for(several: Attacked) -> None:
    log = several.server.log.read_text(errors="replace")
    assert all(f"ApiServer_{number}" in log for number in range(SERVERS))
