"""`steering` on every route that generates, as clients send it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.conftest import Server

GENERATED = 4
CLAMP = {"sae": "demo", "feature": 5, "op": "clamp", "value": 8.0}
IN_GENERATION = {"feature": 3, "op": "add", "value": 2.0, "where": {"phase": "generation"}}
STEERING = {"interventions": [IN_GENERATION, CLAMP]}
PROMPT = [5, 6, 7]
MESSAGES: Any = [{"role": "user", "content": "w5 w6 w7"}]


def check(report: dict[str, Any], *, requests: int = 1) -> None:
    """The report of STEERING, in the order of the request, on prompts of any length."""
    assert report["requests"] == requests
    assert report["policies"] == []
    assert "incomplete" not in report
    added, clamped = report["interventions"]
    assert (added["sae"], added["feature"], added["op"]) == ("demo", 3, "add")
    assert added["tokens"] == GENERATED * requests
    assert added["after"]["mean"] == pytest.approx(added["before"]["mean"] + 2.0, abs=1e-4)
    assert (clamped["feature"], clamped["op"]) == (5, "clamp")
    assert clamped["tokens"] + clamped["tokens_from_cache"] > added["tokens"]
    assert clamped["after"] == {"mean": 8.0, "max": 8.0}
    assert clamped["before"]["max"] >= clamped["before"]["mean"] >= 0


def test_completions_count_exactly_the_tokens_that_were_steered(server: Server) -> None:
    reply = server.openai.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=GENERATED, extra_body={"steering": STEERING}
    )
    report = (reply.model_extra or {})["steering"]
    check(report)
    # The last generated token is never computed.
    assert report["interventions"][1]["tokens"] == len(PROMPT) + GENERATED - 1


def test_streamed_completions_say_the_same_as_whole_ones(server: Server) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": GENERATED, "temperature": 0}
    whole = server.openai.completions.create(**asked, extra_body={"steering": STEERING})
    chunks = list(server.openai.completions.create(**asked, stream=True, extra_body={"steering": STEERING}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].id == chunks[0].id
    assert (chunks[-1].model_extra or {})["steering"] == (whole.model_extra or {})["steering"]
    assert all("steering" not in (chunk.model_extra or {}) for chunk in chunks[:-1])


def test_steering_changes_what_is_generated_and_an_empty_change_does_not(server: Server) -> None:
    def text(steering: dict[str, Any] | None) -> str:
        extra = None if steering is None else {"steering": steering}
        asked = server.openai.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, extra_body=extra
        )
        return asked.choices[0].text

    plain = text(None)
    strong = [{"feature": n, "op": "clamp", "value": 30.0} for n in range(4)]
    assert text({"interventions": strong}) != plain
    assert text({"interventions": [{"feature": 5, "op": "scale", "value": 1}]}) == plain
    assert text({"interventions": []}) == plain


def test_chat_completions_whole_and_streamed(server: Server) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": GENERATED}
    whole = server.openai.chat.completions.create(**asked, extra_body={"steering": STEERING})
    check((whole.model_extra or {})["steering"])
    chunks = list(
        server.openai.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}, extra_body={"steering": STEERING}
        )
    )
    check((chunks[-1].model_extra or {})["steering"])
    check((chunks[-2].model_extra or {})["steering"])
    assert chunks[-1].usage is not None


def test_responses_whole_and_streamed(server: Server) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "w5 w6", "max_output_tokens": GENERATED}
    whole = server.openai.responses.create(**asked, extra_body={"steering": STEERING})
    check((whole.model_extra or {})["steering"])
    events = list(server.openai.responses.create(**asked, stream=True, extra_body={"steering": STEERING}))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    check((events[-1].response.model_extra or {})["steering"])


def test_messages_whole_and_streamed(server: Server) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": GENERATED, "steering": STEERING}
    check(server.post("/v1/messages", body).json()["steering"])
    streamed = server.post("/v1/messages", {**body, "stream": True}).text
    name, data = streamed.strip().split("\n\n")[-1].split("\ndata: ")
    assert name == "event: message_stop"
    check(json.loads(data)["steering"])


def test_several_prompts_and_several_samples_are_reported_as_one(server: Server) -> None:
    prompts = [[5, 6, 7], [8, 9]]
    reply = server.openai.completions.create(
        model="tiny", prompt=prompts, n=2, max_tokens=GENERATED, extra_body={"steering": STEERING}
    )
    assert len(reply.choices) == 4
    check((reply.model_extra or {})["steering"], requests=4)


@pytest.mark.parametrize(
    ("where", "warning"),
    [
        ({"phase": "prompt", "start": 2}, "some token of each of 2 prompts, got none of 1 of them"),
        ({"phase": "prompt", "start": 3}, "some token of this request, got none"),
        ({"start": 3 + GENERATED - 1}, "some token of this request, got none"),
        ({"phase": "generation", "start": GENERATED - 1}, None),
    ],
)
def test_a_window_that_matches_nothing_of_a_prompt_is_told_in_the_report(
    server: Server, where: dict[str, Any], warning: str | None
) -> None:
    steering = {"interventions": [CLAMP, {**IN_GENERATION, "where": where}]}
    reply = server.openai.completions.create(
        model="tiny", prompt=[[5, 6, 7], [8, 9]], max_tokens=GENERATED, extra_body={"steering": steering}
    )
    report = (reply.model_extra or {})["steering"]
    wanted = f"expected a window that includes {warning} - at $.steering.interventions[1].where"
    assert report.get("warnings") == ([wanted] if warning else None)


def test_one_feature_has_one_value_in_the_prompt_and_another_in_the_reply(server: Server) -> None:
    before = {**CLAMP, "where": {"phase": "prompt", "stop": -1}}
    after = {**CLAMP, "value": 3.0, "where": {"phase": "generation"}}
    reply = server.openai.completions.create(
        model="tiny",
        prompt=[*range(20, 40), 5, 6, 7],
        max_tokens=GENERATED,
        extra_body={"steering": {"interventions": [after, before]}},
    )
    first, second = (reply.model_extra or {})["steering"]["interventions"]
    assert (first["tokens"], first["after"]) == (GENERATED, {"mean": 3.0, "max": 3.0})
    assert (second["tokens"], second["after"]) == (22, {"mean": 8.0, "max": 8.0})


def test_logprobs_and_echo_stand_beside_steering(server: Server) -> None:
    reply = server.openai.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=GENERATED,
        logprobs=3,
        echo=True,
        extra_body={"steering": STEERING},
    )
    assert reply.choices[0].logprobs is not None
    assert len(reply.choices[0].logprobs.tokens or []) == len(PROMPT) + GENERATED
    check((reply.model_extra or {})["steering"])


OTHERS: dict[str, tuple[dict[str, Any], int]] = {
    "/invocations": ({"prompt": PROMPT, "max_tokens": GENERATED}, 1),
    "/v1/chat/completions/batch": ({"messages": [MESSAGES, MESSAGES], "max_tokens": GENERATED}, 2),
    "/inference/v1/generate": ({"token_ids": PROMPT, "sampling_params": {"max_tokens": GENERATED}}, 1),
}


@pytest.mark.parametrize("path", OTHERS)
def test_every_other_generating_route_is_steered_too(server: Server, path: str) -> None:
    body, requests = OTHERS[path]
    reply = server.post(path, {"model": "tiny", **body, "steering": STEERING})
    assert reply.status_code == 200, reply.text
    check(reply.json()["steering"], requests=requests)


def test_tokens_in_tokens_out_streams_its_report(server: Server) -> None:
    body, _ = OTHERS["/inference/v1/generate"]
    reply = server.post(
        "/inference/v1/generate", {"model": "tiny", **body, "stream": True, "steering": STEERING}
    )
    *_, last, done = reply.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    check(json.loads(last.removeprefix("data: "))["steering"])


def test_scores_are_steered_and_reported(server: Server) -> None:
    body = {"model": "tiny", "query": [5, 6], "items": [[7], [8]], "label_token_ids": [9, 10]}
    plain = server.post("/generative_scoring", body).json()
    steered = server.post("/generative_scoring", {**body, "steering": {"interventions": [CLAMP]}}).json()
    assert steered["steering"]["requests"] == 2
    assert steered["steering"]["interventions"][0]["tokens"] == 6
    assert [item["score"] for item in steered["data"]] != [item["score"] for item in plain["data"]]


def test_a_prompt_steered_before_is_reported_as_coming_from_the_cache(server: Server) -> None:
    steering = {"interventions": [{"feature": 11, "op": "add", "value": 1.25}]}
    body = {
        "model": "tiny",
        "prompt": [3 + n % 300 for n in range(300)],
        "max_tokens": 2,
        "steering": steering,
    }
    first, second = (
        server.post("/v1/completions", body).json()["steering"]["interventions"][0] for _ in range(2)
    )
    assert (first["tokens"], first["tokens_from_cache"]) == (301, 0)
    assert second["tokens_from_cache"] > 0
    assert second["tokens"] + second["tokens_from_cache"] == 301


def test_a_label_and_a_direction_are_named_in_the_report(server: Server) -> None:
    interventions = [
        {"direction": "french", "op": "add", "value": 4.0},
        {"feature": "legal", "op": "ablate"},
        {"feature": 9, "op": "at_least", "value": 1.0},
    ]
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2, "steering": {"interventions": interventions}}
    french, legal, food = server.post("/v1/completions", body).json()["steering"]["interventions"]
    assert (french["direction"], french["after"]["mean"] - french["before"]["mean"]) == (
        "french",
        pytest.approx(4.0, abs=1e-4),
    )
    assert (legal["feature"], legal["label"], legal["after"]) == (7, "legal", {"mean": 0.0, "max": 0.0})
    assert (food["label"], food["after"]["mean"] >= 1.0) == ("food", True)


def test_vllm_xargs_carry_steering_as_one_json_string(server: Server) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    steering = {"interventions": [{"feature": n, "op": "clamp", "value": 30.0} for n in range(4)]}
    by_field = server.post("/v1/completions", {**asked, "steering": steering}).json()
    by_xargs = server.post(
        "/v1/completions", {**asked, "vllm_xargs": {"steering": json.dumps(steering)}}
    ).json()
    assert by_xargs["choices"][0]["text"] == by_field["choices"][0]["text"]
    assert by_xargs["steering"] == by_field["steering"]


def test_a_report_is_left_out_where_it_is_not_wanted(server: Server) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2, "steering": {**STEERING, "report": False}}
    assert "steering" not in server.post("/v1/completions", body).json()
    assert '"steering"' not in server.post("/v1/completions", {**body, "stream": True}).text
