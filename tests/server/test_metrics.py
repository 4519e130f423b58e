"""What an operator sees on vLLM's own /metrics."""

from __future__ import annotations

from typing import Any

from tests.server.conftest import Server

CLAMP = {"feature": 5, "op": "clamp", "value": 8.0}


def complete(server: Server, steering: dict[str, Any], tokens: int = 4) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": tokens, "steering": steering}
    reply: dict[str, Any] = server.post("/v1/completions", body).json()
    return reply


def test_requests_and_tokens_are_counted_by_sae_and_op(server: Server) -> None:
    def counts() -> list[float]:
        return [
            server.metric("steerserve_requests_total", sae="demo", op="clamp"),
            server.metric("steerserve_tokens_total", sae="demo", op="clamp"),
            server.metric("steerserve_requests_total", sae="direction:french", op="add"),
            server.metric("steerserve_tokens_total", sae="direction:french", op="add"),
            server.metric("steerserve_admission_seconds_count"),
        ]

    complete(server, {"interventions": []})
    before = counts()
    french = {"direction": "french", "op": "add", "value": 1.0, "where": {"phase": "generation"}}
    complete(server, {"interventions": [CLAMP, french]})
    assert [after - old for after, old in zip(counts(), before, strict=True)] == [1, 6, 1, 4, 1]


def test_tokens_of_requests_without_a_report_are_counted_in_the_background(server: Server) -> None:
    before = server.metric("steerserve_tokens_total", op="at_most")
    at_most = {"feature": 6, "op": "at_most", "value": 1.0}
    complete(server, {"interventions": [at_most], "report": False})
    assert server.eventually(lambda: server.metric("steerserve_tokens_total", op="at_most") == before + 6)


def test_rejections_are_counted_by_reason(server: Server) -> None:
    cases = {
        "malformed": {"interventions": 7},
        "out_of_range": {"interventions": [{**CLAMP, "feature": 500}]},
        "unknown_sae": {"interventions": [{**CLAMP, "sae": "x"}]},
        "duplicate": {"interventions": [CLAMP, CLAMP]},
    }
    for reason, steering in cases.items():
        before = server.metric("steerserve_rejections_total", reason=reason)
        complete(server, steering)
        assert server.metric("steerserve_rejections_total", reason=reason) == before + 1, reason


def test_slots_are_shown_with_their_capacity(server: Server) -> None:
    complete(server, {"interventions": [CLAMP]})
    assert server.metric("steerserve_slots_capacity") == 32
    assert server.eventually(lambda: server.metric("steerserve_slots_in_use") == 0)
