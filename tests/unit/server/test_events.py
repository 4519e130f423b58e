"""Streams as vLLM sends them, cut anywhere, put together again by OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from steerserve.server.events import held_from, splice, with_report

from .conftest import STEERING, Client, event

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
DONE = event("[DONE]")


def chunk(index: int = 0, text: str | None = None, ends: str | None = None) -> bytes:
    delta = {} if text is None else {"content": text}
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": ends}
    return b"data: " + json.dumps({**HEAD, "choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


def called(**call: Any) -> bytes:
    """A piece of the one call of a tool."""
    delta = {"tool_calls": [{"index": 0, **call}]}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    return b"data: " + json.dumps({**HEAD, "choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


def usage() -> bytes:
    return (
        b"data: "
        + json.dumps({**HEAD, "choices": [], "usage": USAGE}, separators=(",", ":")).encode()
        + b"\n\n"
    )


def parsed(stream: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix(b"data: ") for line in stream.splitlines() if line]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def completion(stream: bytes) -> Any:
    state: Any = ChatCompletionStreamState()
    for one in parsed(stream):
        state.handle_chunk(ChatCompletionChunk.construct(**one))
    return state.current_completion_snapshot


def said(choice: Any) -> Any:
    return choice.message.content, choice.message.tool_calls


ONE = [chunk(text="a"), chunk(text='b "finish_reason":"stop"'), chunk(text="c", ends="stop")]
THREE = [
    *(chunk(i, text="x") for i in range(3)),
    chunk(1, text="y", ends="stop"),
    chunk(0, text="z"),
    chunk(2, ends="length"),
    chunk(0, text="w", ends="stop"),
]
TOOLS = [
    called(id="call-1", type="function", function={"name": "look", "arguments": ""}),
    called(function={"arguments": '{"finish_reason":'}),
    called(function={"arguments": '"stop"}'}),
    chunk(ends="tool_calls"),
]
EMPTY = [chunk(text=""), chunk(ends="content_filter")]


@pytest.mark.parametrize("chunks", [ONE, THREE, TOOLS, EMPTY], ids=["one", "three", "tools", "empty"])
@pytest.mark.parametrize("tail", [[DONE], [usage(), DONE]], ids=["plain", "usage"])
def test_a_stream_keeps_its_text_and_usage_and_shows_the_report_once(
    chunks: list[bytes], tail: list[bytes]
) -> None:
    whole = b"".join([*chunks, *tail])
    plain = completion(whole)
    at = held_from(b"".join(chunks))
    assert b"".join(chunks)[at:] == chunks[-1]
    told = whole[:at] + with_report(whole[at:], {"requests": 1})
    steered = completion(told)
    assert [said(c) for c in steered.choices] == [said(c) for c in plain.choices]
    assert [c.finish_reason for c in steered.choices] == [c.finish_reason for c in plain.choices]
    assert steered.usage == plain.usage
    found = [
        c.message.model_extra["steering"] for c in steered.choices if "steering" in c.message.model_extra
    ]
    assert found == [{"requests": 1}]
    assert len(parsed(told)) == len(parsed(whole))


@pytest.mark.parametrize("chunks", [ONE, THREE, TOOLS, EMPTY], ids=["one", "three", "tools", "empty"])
@pytest.mark.parametrize("tail", [[DONE], [usage(), DONE]], ids=["plain", "usage"])
@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
def test_however_the_server_cuts_it_the_client_gets_the_same_stream(
    post: Client, chunks: list[bytes], tail: list[bytes], size: int
) -> None:
    whole = b"".join([*chunks, *tail])
    # The first part is sent before the request is admitted.
    parts = [b"", *(whole[i : i + size] for i in range(0, len(whole), size))]
    reply = post("/v1/chat/completions", {"stream": True, "steering": STEERING}, chunks=parts)
    steered, plain = completion(reply.content), completion(whole)
    assert [said(c) for c in steered.choices] == [said(c) for c in plain.choices]
    assert steered.usage == plain.usage
    shown = [one["steering"] for one in parsed(reply.content) if "steering" in one]
    assert len(shown) == len(tail)
    assert all(one == shown[0] and one["requests"] == 1 for one in shown)
    assert len(parsed(reply.content)) == len(parsed(whole))
    unwanted = {"stream": True, "steering": {**STEERING, "report": False}}
    assert post("/v1/chat/completions", unwanted, chunks=parts).content == whole


def test_an_error_in_a_stream_carries_no_report(post: Client) -> None:
    error = event({"error": {"message": "no", "code": 500}})
    parts = [b"", ONE[0], error, DONE]
    reply = post("/v1/chat/completions", {"stream": True, "steering": STEERING}, chunks=parts)
    assert reply.content == ONE[0] + error + DONE


def test_a_stream_of_a_kind_without_ends_shows_its_report_on_an_event_of_its_own(post: Client) -> None:
    parts = [b"", chunk(text="a"), DONE]
    shown = parsed(post("/v1/chat/completions", {"stream": True, "steering": STEERING}, chunks=parts).content)
    assert (shown[-1]["id"], shown[-1]["choices"]) == (HEAD["id"], [])
    assert "steering" in shown[-1]


MESSAGE = {"id": "m", "type": "message", "role": "assistant", "content": [], "stop_reason": "end_turn"}


@pytest.mark.parametrize(("reason", "kind"), [("end_turn", "steering"), ("refusal", "refusal")])
def test_anthropics_message_says_how_it_was_steered_in_its_stop_details(
    post: Client, reason: str, kind: str
) -> None:
    delta = {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"output_tokens": 3}}
    parts = [b"", event(delta, "message_delta"), event({"type": "message_stop"}, "message_stop")]
    reply = post("/v1/chat/completions", {"stream": True, "steering": STEERING}, chunks=parts)
    told, stop = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: ")]
    details = told["delta"]["stop_details"]
    assert details["type"] == kind
    assert details["steering"] == told["steering"] == stop["steering"]
    whole = json.loads(splice(json.dumps({**MESSAGE, "stop_reason": reason}).encode(), {"requests": 1}))
    assert (whole["stop_details"]["type"], whole["steering"]) == (kind, {"requests": 1})
