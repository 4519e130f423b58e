"""What offline `LLM` drops before admission sees it, and beam search, which makes prompts of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError

from steerserve.carried import CARRIED
from steerserve.errors import RequestError, RouteError
from steerserve.metrics import count_rejection

from .seams import wrap
from .unread import check_params, check_prompt, check_settings

__all__ = ["install"]

_CHAT = "/v1/chat/completions"


def install() -> None:
    """Wrap what prepares the prompts of `LLM`, and beam search there and in the server."""
    wrap("offline_prompts", _wrap_prompts)
    wrap("offline_chats", _wrap_chats)
    wrap("offline_beams", _wrap_offline_beams)
    wrap("online_beams", _wrap_online_beams)


def _wrap_prompts(original: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess(self: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        given = _given(original, self, prompts, *args, **kwargs)
        _refusing(_check_prompts, self.llm_engine.input_processor, prompts, _objects(given))
        return original(self, prompts, *args, **kwargs)

    return preprocess


def _wrap_chats(original: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess(self: Any, conversations: Any, *args: Any, **kwargs: Any) -> Any:
        given = _given(original, self, conversations, *args, **kwargs)
        settings = {"messages": conversations, "tools": given.get("tools"), **_objects(given)}
        _refusing(_check_settings, self.llm_engine.input_processor, settings)
        return original(self, conversations, *args, **kwargs)

    return preprocess


def _wrap_offline_beams(original: Callable[..., Any]) -> Callable[..., Any]:
    def beam_search(self: Any, prompts: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        _refusing(_check_beams, self.llm_engine.input_processor, params)
        return original(self, prompts, params, *args, **kwargs)

    return beam_search


def _wrap_online_beams(original: Callable[..., Any]) -> Callable[..., Any]:
    def beam_search(self: Any, prompt: Any, request_id: str, params: Any, *args: Any, **kwargs: Any) -> Any:
        _refusing(_check_beams, self.engine_client.input_processor, params)
        return original(self, prompt, request_id, params, *args, **kwargs)

    return beam_search


def _given(original: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    return inspect.signature(original).bind(*args, **kwargs).arguments


def _objects(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are objects: what a template, a tokenizer or a processor is handed."""
    return {name: value for name, value in given.items() if isinstance(value, dict)}


def _check_prompts(processor: Any, prompts: Any, settings: dict[str, Any]) -> None:
    for prompt in prompts:
        check_prompt(processor, prompt)
    check_settings(processor, settings)


def _check_settings(processor: Any, settings: dict[str, Any]) -> None:
    check_settings(processor, settings, _CHAT)


def _check_beams(processor: Any, params: Any) -> None:
    """Each token of each beam is a new prompt to the engine: nothing may depend on where a prompt ends.

    Raises: RouteError.
    """
    check_params(processor, params)
    carried, enforcement = CARRIED.get(), processor._steerserve_enforcement
    if carried is not None and carried.own is not None:
        raise RouteError("expected no beam search beside `steering`", reason="combination")
    if enforcement is None:
        return
    in_force = carried.in_force if carried is not None else None
    (in_force or enforcement.current()).check_beams()


def _refusing(check: Callable[..., None], *args: Any) -> None:
    """Run a check; what it refuses is refused as vLLM refuses a request."""
    try:
        check(*args)
    except RequestError as error:
        count_rejection(error.reason)
        raise VLLMValidationError(str(error), parameter=error.param) from error
