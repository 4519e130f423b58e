"""What the openai and anthropic clients make of a steered reply: all of an unsteered one, and the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from anthropic import Anthropic
from openai import LengthFinishReasonError

from tests.server.conftest import KEY, Server

# At scale 1 nothing changes.
STEERING = {"interventions": [{"feature": n, "op": "scale", "value": 1.0} for n in (3, 5)]}
EXTRA = {"steering": STEERING}
MESSAGES: Any = [{"role": "user", "content": "w5 w6 w7"}]
WAYS: dict[str, dict[str, Any]] = {
    "max tokens": {"max_tokens": 6},
    "stop": {"max_tokens": 40, "stop": ["w1"]},
    "n = 3": {"max_tokens": 6, "n": 3, "seed": 7, "temperature": 1.0},
    "a choice": {"max_tokens": 6, "extra_body": {"structured_outputs": {"choice": ["w17", "w18"]}}},
}
USAGE = {"stream_options": {"include_usage": True}}
Shown = tuple[list[tuple[str | None, str | None]], tuple[int, int] | None]


def steering_of(model: Any) -> Any:
    return (model.model_extra or {}).get("steering") if model is not None else None


def usage_of(reply: Any) -> tuple[int, int] | None:
    return None if reply.usage is None else (reply.usage.prompt_tokens, reply.usage.completion_tokens)


def asked(way: str, extra: dict[str, Any], **more: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"model": "tiny", "temperature": 0.0, **WAYS[way], **more}
    return {**known, "extra_body": {**known.get("extra_body", {}), **extra}}


class ChatWhole:
    """`chat.completions.create`."""

    def __init__(self, server: Server, **asked: Any) -> None:
        reply: Any = self.reply(server, **asked)
        self.choices = [(c.message.content, c.finish_reason) for c in reply.choices]
        self.usage, self.report = usage_of(reply), steering_of(reply)

    def reply(self, server: Server, **asked: Any) -> Any:
        return server.openai.chat.completions.create(messages=MESSAGES, **asked)


class ChatParsed(ChatWhole):
    """`chat.completions.parse`."""

    def reply(self, server: Server, **asked: Any) -> Any:
        try:
            return server.openai.chat.completions.parse(messages=MESSAGES, **asked)
        except LengthFinishReasonError as error:
            return error.completion


class ChatLoop:
    """The plain loop over a stream, which looks at the first choice of every chunk."""

    def __init__(self, server: Server, **asked: Any) -> None:
        texts: dict[int, str] = {}
        ends: dict[int, str] = {}
        self.usage, found = None, []
        for chunk in self.stream(server, **asked):
            if "stream_options" not in asked:
                assert chunk.choices[0] is not None
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + (self.text(choice) or "")
                ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
            self.usage = usage_of(chunk) or self.usage
            found += [steering_of(chunk)] if steering_of(chunk) else []
        self.choices = [(texts[i], ends[i]) for i in sorted(texts)]
        # On the last chunk that ends a choice, and where there is one on that with the usage.
        assert len(found) in (0, 2 if "stream_options" in asked else 1)
        assert all(one == found[0] for one in found)
        self.report = found[0] if found else None

    def stream(self, server: Server, **asked: Any) -> Any:
        return server.openai.chat.completions.create(messages=MESSAGES, stream=True, **asked)

    def text(self, choice: Any) -> str | None:
        return choice.delta.content  # type: ignore[no-any-return]


class ChatHelper:
    """`chat.completions.stream`, which puts the completion together."""

    def __init__(self, server: Server, **asked: Any) -> None:
        with server.openai.chat.completions.stream(messages=MESSAGES, **asked) as stream:
            for _ in stream:
                pass
            reply: Any
            try:
                reply = stream.get_final_completion()
            except LengthFinishReasonError as error:
                reply = error.completion
        self.choices = [(c.message.content, c.finish_reason) for c in reply.choices]
        self.usage = usage_of(reply)
        (self.report,) = [r for c in reply.choices if (r := steering_of(c.message))] or [None]


class Completed(ChatWhole):
    """`completions.create`."""

    def __init__(self, server: Server, **asked: Any) -> None:
        reply = server.openai.completions.create(prompt=[5, 6, 7], **asked)
        self.choices = [(c.text, c.finish_reason) for c in reply.choices]
        self.usage, self.report = usage_of(reply), steering_of(reply)


class CompletedLoop(ChatLoop):
    """The plain loop over its stream."""

    def stream(self, server: Server, **asked: Any) -> Any:
        return server.openai.completions.create(prompt=[5, 6, 7], stream=True, **asked)

    def text(self, choice: Any) -> str | None:
        return choice.text  # type: ignore[no-any-return]


CHAT: list[Any] = [ChatWhole, ChatParsed, ChatLoop, ChatHelper]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("clients", [CHAT, [Completed, CompletedLoop]], ids=["chat", "completions"])
def test_every_way_to_ask_openai_shows_the_same_and_the_report(
    server: Server, way: str, clients: list[Any]
) -> None:
    reports = []
    for client in clients:
        streams = client in (ChatLoop, ChatHelper, CompletedLoop)
        for more in ({}, USAGE) if streams else ({},):
            plain = client(server, **asked(way, {}, **more))
            steered = client(server, **asked(way, EXTRA, **more))
            assert plain.report is None
            assert (steered.choices, steered.usage) == (plain.choices, plain.usage)
            assert (steered.usage is None) == (streams and not more)
            assert len(steered.choices) == WAYS[way].get("n", 1)
            reports.append(without_cache(steered.report))
    assert reports[0]["requests"] == WAYS[way].get("n", 1)
    assert all(report == reports[0] for report in reports), reports


def without_cache(report: dict[str, Any]) -> dict[str, Any]:
    """A report, whatever of the prompt came from the cache this time."""
    assert "incomplete" not in report
    entries = [
        {**entry, "tokens": entry["tokens"] + entry["tokens_from_cache"], "tokens_from_cache": 0}
        for entry in report["interventions"]
    ]
    return {**report, "interventions": entries}


RESPONSE: dict[str, Any] = {"model": "tiny", "input": "w5 w6", "max_output_tokens": 6, "temperature": 0}


def test_the_responses_client_keeps_the_report_whole_streamed_and_parsed(server: Server) -> None:
    def stream(extra: dict[str, Any]) -> Any:
        with server.openai.responses.stream(**RESPONSE, extra_body=extra) as events:
            return events.get_final_response()

    def loop(extra: dict[str, Any]) -> Any:
        *_, last = server.openai.responses.create(**RESPONSE, stream=True, extra_body=extra)
        return last.response

    def whole(extra: dict[str, Any]) -> Any:
        return server.openai.responses.create(**RESPONSE, extra_body=extra)

    reports = []
    for ask in (whole, loop, stream):
        plain, steered = ask({}), ask(EXTRA)
        assert (steered.output_text, steered.status) == (plain.output_text, plain.status)
        assert (steered.usage.output_tokens, steered.usage.input_tokens) == (
            plain.usage.output_tokens,
            plain.usage.input_tokens,
        )
        reports.append(without_cache(steering_of(steered)))
    assert all(report == reports[0] for report in reports)


@pytest.fixture
def anthropic(server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, auth_token=KEY, api_key=None, max_retries=0) as client:
        yield client


def test_every_way_to_ask_anthropic_shows_the_same_and_the_report(
    server: Server, anthropic: Anthropic
) -> None:
    def whole(**known: Any) -> Any:
        return anthropic.messages.create(**known)

    def helper(**known: Any) -> Any:
        with anthropic.messages.stream(**known) as stream:
            events = list(stream)
            message = stream.get_final_message()
        found = [steering_of(event) for event in events if steering_of(event)]
        details = message.stop_details
        assert (not found and details is None) or found[0] == steering_of(details)
        return message

    for way in ({"max_tokens": 6}, {"max_tokens": 40, "stop_sequences": ["w1"]}):
        reports = []
        for ask in (whole, helper):
            known: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, **way}
            cold = {"temperature": 0}
            plain, steered = ask(**known, extra_body=cold), ask(**known, extra_body=cold | EXTRA)
            assert steered.content == plain.content
            assert (steered.stop_reason, steered.stop_sequence) == (plain.stop_reason, plain.stop_sequence)
            assert steered.usage.output_tokens == plain.usage.output_tokens
            assert total_input(steered) == total_input(plain)
            assert plain.stop_details is None
            reports.append(without_cache(steering_of(steered.stop_details)))
        assert reports[0] == reports[1]
    assert steering_of(whole(**known, extra_body=EXTRA))["requests"] == 1


def total_input(message: Any) -> int:
    return sum(
        getattr(message.usage, name) or 0
        for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    )


def test_no_event_is_added_to_a_stream(server: Server) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "temperature": 0, "stream": True}
    for path in ("/v1/chat/completions", "/v1/messages"):
        plain = server.post(path, body).text.split("\n\n")
        steered = server.post(path, {**body, **EXTRA}).text.split("\n\n")
        assert len(plain) == len(steered)
        assert json.dumps(STEERING) not in steered
