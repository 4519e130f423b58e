"""What a client sees of a request that `ending` ended: "content_filter", in the words of each API.

And what is known here alone: at which of its tokens the front end ended each request.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from importlib.util import find_spec
from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FinishReason

from steerserve.carried import CARRIED, Ends

from .ending import MARKER
from .seams import COHERE_SEAMS, check, wrap

__all__ = ["FINISH_REASON", "install"]

_ENDS = "_steerserve_ends"
FINISH_REASON = "content_filter"
ANTHROPIC_REASON = "refusal"
# Of the six reasons that Cohere's API knows, the one that no client takes for a whole reply.
COHERE_REASON = "ERROR"

_installed = False


def install() -> None:
    """Wrap the front end's side, once its seams are checked; harmless when called again.

    Raises: IncompatibleError if Cohere's API is served, and not by the function that is wrapped.
    """
    global _installed
    if _installed:
        return
    _installed = True
    wrap("request_state", _wrap_request_state)
    wrap("completion_output", _wrap_completion_output)
    wrap("chat_full_generator", _wrap_chat_full_generator)
    wrap("responses_full_generator", _wrap_responses_full_generator)
    _widen_anthropic()
    wrap("anthropic_stop_reason", _wrap_anthropic_stop_reason)
    # vLLM serves this API only where Cohere's own library is installed.
    if find_spec("cohere") is not None:
        check(COHERE_SEAMS)
        wrap("cohere_finish_reason", _wrap_cohere_finish_reason)


class _SentThoughEmpty(str):
    """No text, yet not skipped: vLLM's streams leave out a first chunk that has neither text nor tokens."""

    def __bool__(self) -> bool:
        return True


def _wrap_completion_output(original: Callable[..., Any]) -> Callable[..., Any]:
    def new_completion_output(self: Any, token_ids: Any, finish_reason: Any, stop_reason: Any) -> Any:
        output = original(self, token_ids, finish_reason, stop_reason)
        is_ours = finish_reason == FinishReason.ABORT and stop_reason == MARKER
        if finish_reason is not None:
            _note_end(self, is_ours)
        if not is_ours:
            return output
        output.finish_reason, output.stop_reason = FINISH_REASON, None
        if self.detokenizer.num_output_tokens() == 0:
            _fill_prompt_logprobs(self)
            if self.output_kind == RequestOutputKind.DELTA:
                output.text = _SentThoughEmpty()
        return output

    return new_completion_output


def _wrap_request_state(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, request_id: str, *args: Any, **kwargs: Any) -> None:
        original(self, request_id, *args, **kwargs)
        carried = CARRIED.get()
        if carried is not None:
            # Outputs come from a task of their own, whose context is nobody's.
            setattr(self, _ENDS, carried.ends)
            carried.ends.begin(request_id)

    return init


def _note_end(state: Any, is_ours: bool) -> None:
    """A position counts if the token that follows it is the client's.

    So does the one at which a condition ended the request: the tokens behind it are what it kept back.
    """
    ends: Ends | None = getattr(state, _ENDS, None)
    if ends is not None:
        tokens = state.prompt_len + state.detokenizer.num_output_tokens()
        ends.end(state.request_id, tokens if is_ours else tokens - 1)


def _fill_prompt_logprobs(state: Any) -> None:
    """A prompt that was cut short has none, whichever of its chunks were computed; the list stays aligned."""
    logprobs = state.logprobs_processor.prompt_logprobs
    if logprobs is not None:
        for _ in range(state.prompt_len - len(logprobs)):
            logprobs.append(None)


def _wrap_chat_full_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    async def full_generator(self: Any, request: Any, results: Any, *args: Any, **kwargs: Any) -> Any:
        ended: set[int] = set()
        response = await original(self, request, _watch(results, ended), *args, **kwargs)
        for choice in getattr(response, "choices", ()):
            # vLLM says "tool_calls" of every reply that holds one.
            if choice.index in ended:
                choice.finish_reason = FINISH_REASON
        return response

    return full_generator


async def _watch(results: AsyncIterator[Any], ended: set[int]) -> AsyncIterator[Any]:
    async for result in results:
        ended.update(o.index for o in result.outputs if o.finish_reason == FINISH_REASON)
        yield result


def _wrap_responses_full_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    async def full_generator(
        self: Any, request: Any, params: Any, results: Any, context: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from openai.types.responses.response import IncompleteDetails

        response = await original(self, request, params, results, context, *args, **kwargs)
        if _reason(context) == FINISH_REASON and hasattr(response, "incomplete_details"):
            response.status = "incomplete"
            response.incomplete_details = IncompleteDetails(reason="content_filter")
        carried = CARRIED.get()
        if carried is not None:
            # Asked for by its id, vLLM gives this object once more.
            carried.keep = functools.partial(setattr, response, "steering")
        return response

    return full_generator


def _reason(context: Any) -> str | None:
    """Why the last turn of a Responses conversation ended; its contexts keep that in two places."""
    final = getattr(context, "final_output", None)
    reason: str | None = final.outputs[0].finish_reason if final else getattr(context, "finish_reason", None)
    return reason


def _widen_anthropic() -> None:
    """Let vLLM's models of Anthropic's API say "refusal", which the API has and they leave out."""
    from vllm.entrypoints.anthropic import protocol

    for model in (protocol.AnthropicDelta, protocol.AnthropicMessagesResponse):
        model.model_fields["stop_reason"].annotation = str | None
        model.model_rebuild(force=True)
    protocol.AnthropicStreamEvent.model_rebuild(force=True)


def _wrap_anthropic_stop_reason(original: Callable[..., Any]) -> Callable[..., Any]:
    def stop_reason(finish_reason: str | None, *args: Any, **kwargs: Any) -> Any:
        if finish_reason == FINISH_REASON:
            return ANTHROPIC_REASON, None
        return original(finish_reason, *args, **kwargs)

    return stop_reason


def _wrap_cohere_finish_reason(original: Callable[..., Any]) -> Callable[..., Any]:
    def finish_reason(reason: str | None, *args: Any, **kwargs: Any) -> Any:
        return COHERE_REASON if reason == FINISH_REASON else original(reason, *args, **kwargs)

    return finish_reason
