"""What each API's client reads of a request that was ended. No engine is started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.entrypoints.anthropic import protocol as anthropic
from vllm.entrypoints.anthropic import serving as anthropic_serving
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor

from steerserve_vllm import ending_shown
from steerserve_vllm.ending import MARKER
from steerserve_vllm.ending_shown import (
    _wrap_chat_full_generator,
    _wrap_cohere_finish_reason,
    _wrap_responses_full_generator,
)

ending_shown.install()

PROMPT = [0, 5, 6, 7]
ENDED = {"finish_reason": FinishReason.ABORT, "stop_reason": MARKER}


def shown(outputs: list[dict[str, Any]], **params: Any) -> list[Any]:
    """What a client of the engine reads of these outputs of its core."""
    processor = OutputProcessor(None, log_stats=False)
    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=PROMPT,
        mm_features=None,
        sampling_params=SamplingParams(detokenize=False, **params),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id="r",
    )
    processor.add_request(request, None)
    said = [EngineCoreOutput(request_id="r", **output) for output in outputs]
    return [reply for output in said for reply in processor.process_outputs([output]).request_outputs]


def test_an_abort_with_the_marker_is_a_content_filter_without_a_stop_reason() -> None:
    reply = shown([{"new_token_ids": [9]}, {"new_token_ids": [10], **ENDED}])[-1]
    sample = reply.outputs[0]
    assert (sample.finish_reason, sample.stop_reason, list(sample.token_ids)) == (
        "content_filter",
        None,
        [9, 10],
    )


@pytest.mark.parametrize(
    ("reason", "marker"),
    [(FinishReason.ABORT, None), (FinishReason.STOP, MARKER), (FinishReason.LENGTH, None)],
)
def test_other_ends_are_shown_as_ever(reason: FinishReason, marker: str | None) -> None:
    (reply,) = shown([{"new_token_ids": [9], "finish_reason": reason, "stop_reason": marker}])
    assert (reply.outputs[0].finish_reason, reply.outputs[0].stop_reason) == (str(reason), marker)


def test_a_stream_without_a_token_has_one_chunk_that_servers_do_not_leave_out() -> None:
    (reply,) = shown([{"new_token_ids": [], **ENDED}], output_kind=RequestOutputKind.DELTA)
    sample = reply.outputs[0]
    assert sample.text
    assert (str(sample.text) + "", list(sample.token_ids)) == ("", [])


def test_a_whole_reply_without_a_token_has_no_text() -> None:
    (reply,) = shown([{"new_token_ids": [], **ENDED}])
    assert not reply.outputs[0].text


@pytest.mark.parametrize("flat", [False, True])
def test_prompt_logprobs_stay_as_long_as_the_prompt(flat: bool) -> None:
    (reply,) = shown([{"new_token_ids": [], **ENDED}], prompt_logprobs=1, logprobs=1, flat_logprobs=flat)
    assert len(reply.prompt_logprobs) == len(PROMPT)
    assert len(reply.outputs[0].logprobs) == 0


def test_anthropic_calls_it_a_refusal_whole_and_streamed() -> None:
    called = anthropic_serving._to_anthropic_stop_reason(
        "content_filter", None, tool_used=True, tool_complete=True
    )
    assert called == ("refusal", None)
    delta = anthropic.AnthropicDelta(stop_reason=called[0], stop_sequence=None)
    event = anthropic.AnthropicStreamEvent(type="message_delta", delta=delta)
    assert '"stop_reason":"refusal"' in event.model_dump_json(exclude_unset=True)
    reply = anthropic.AnthropicMessagesResponse(id="m", content=[], model="tiny")
    reply.stop_reason = called[0]
    assert '"stop_reason":"refusal"' in reply.model_dump_json()


def test_anthropic_calls_other_ends_what_it_did() -> None:
    called = anthropic_serving._to_anthropic_stop_reason("length", None, tool_used=False, tool_complete=False)
    assert called == ("max_tokens", None)


def test_cohere_does_not_call_it_complete() -> None:
    finish_reason = _wrap_cohere_finish_reason(lambda reason, stop_reason=None: "COMPLETE")
    assert finish_reason("content_filter") == "ERROR"
    assert finish_reason("stop", "w5") == "COMPLETE"


def test_a_chat_reply_that_holds_a_tool_call_still_says_that_it_was_ended() -> None:
    async def serve(self: Any, request: Any, results: AsyncIterator[Any]) -> Any:
        outputs = [output async for result in results for output in result.outputs]
        return SimpleNamespace(
            choices=[SimpleNamespace(index=o.index, finish_reason="tool_calls") for o in outputs]
        )

    async def results() -> AsyncIterator[Any]:
        yield SimpleNamespace(
            outputs=[
                SimpleNamespace(index=0, finish_reason="stop"),
                SimpleNamespace(index=1, finish_reason="content_filter"),
            ]
        )

    reply = asyncio.run(_wrap_chat_full_generator(serve)(None, None, results()))
    assert [choice.finish_reason for choice in reply.choices] == ["tool_calls", "content_filter"]


@pytest.mark.parametrize(
    "context",
    [
        SimpleNamespace(
            final_output=SimpleNamespace(outputs=[SimpleNamespace(finish_reason="content_filter")])
        ),
        SimpleNamespace(finish_reason="content_filter"),
    ],
    ids=["simple", "parsed"],
)
def test_a_response_is_incomplete_because_of_the_content_filter(context: Any) -> None:
    reply = _respond(context)
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "content_filter")


def test_other_responses_stay_as_they_were() -> None:
    reply = _respond(SimpleNamespace(final_output=None, finish_reason="stop"))
    assert (reply.status, reply.incomplete_details) == ("completed", None)


def _respond(context: Any) -> Any:
    async def serve(*args: Any) -> Any:
        return SimpleNamespace(status="completed", incomplete_details=None)

    return asyncio.run(_wrap_responses_full_generator(serve)(None, None, None, None, context))
