"""The one choke point: requests of every route, and of offline `LLM`, become plans here or are refused."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import time
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from steerserve.carried import CARRIED
from steerserve.catalog import Catalog
from steerserve.errors import RequestError, RouteError
from steerserve.metrics import count_rejection, observe_admission
from steerserve.plan import Plan, compile_plan
from steerserve.spec import parse_spec, parse_spec_json

from . import front_end
from .seams import wrap
from .setup import catalog_for, check_engine, config_for

__all__ = ["PLAN_KEY", "SPEC_KEY", "TICKET_KEY", "install", "plan_of"]

# Keys of `SamplingParams.extra_args`: what a client may set, and what only admission sets.
SPEC_KEY = "steering"
TICKET_KEY = "steering_ticket"
PLAN_KEY = "steerserve"

_CATALOG = "_steerserve_catalog"


def install() -> None:
    """Wrap vLLM's InputProcessor."""
    wrap("processor_init", _wrap_init)
    wrap("process_inputs", _wrap_process_inputs)


def plan_of(sampling_params: SamplingParams | None) -> tuple[list[Any], str] | None:
    """The wire form of an admitted request's plan and its ticket; None for a request that is not steered."""
    if sampling_params is None or not sampling_params.extra_args:
        return None
    admitted = sampling_params.extra_args.get(PLAN_KEY)
    return None if admitted is None else (admitted["plan"], admitted["ticket"])


def _wrap_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if config_for(vllm_config) is not None:
            check_engine(vllm_config)
            front_end.install()
        setattr(self, _CATALOG, catalog_for(vllm_config))
        original(self, vllm_config, *args, **kwargs)
        self.process_inputs_async = _in_thread_with_context(self.process_inputs, self.renderer._executor)

    return init


def _in_thread_with_context(function: Callable[..., Any], executor: Any) -> Callable[..., Any]:
    """As vLLM's `make_async`, but the thread sees the caller's context, where the steering travels."""

    def call(*args: Any, **kwargs: Any) -> Any:
        context = contextvars.copy_context()
        bound = functools.partial(context.run, function, *args, **kwargs)
        return asyncio.get_running_loop().run_in_executor(executor, bound)

    return call


def _wrap_process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        extra = dict(getattr(params, "extra_args", None) or {})
        carried = CARRIED.get()
        if carried is None and not extra.keys() & {SPEC_KEY, TICKET_KEY, PLAN_KEY}:
            return original(self, request_id, prompt, params, *args, **kwargs)
        started = time.perf_counter()
        try:
            plan, ticket = _admit(extra, getattr(self, _CATALOG), request_id)
            _check_params(params)
        except RequestError as error:
            count_rejection(error.reason)
            raise VLLMValidationError(str(error), parameter=error.param) from error
        spent = time.perf_counter() - started + (carried.seconds if carried is not None else 0.0)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        try:
            _check_request(request)
        except RequestError as error:
            count_rejection(error.reason)
            raise VLLMValidationError(str(error), parameter=error.param) from error
        for key in (SPEC_KEY, TICKET_KEY):
            extra.pop(key, None)
        request.sampling_params.extra_args = {**extra, PLAN_KEY: {"plan": plan.wire, "ticket": ticket}}
        if carried is not None:
            carried.admitted += 1
        observe_admission(plan, spent)
        return request

    return process_inputs


def _admit(extra: dict[str, Any], catalog: Catalog | None, request_id: str) -> tuple[Plan, str]:
    carried = CARRIED.get()
    if PLAN_KEY in extra or (TICKET_KEY in extra and SPEC_KEY not in extra):
        raise RequestError(f"expected no `{PLAN_KEY}` in extra_args, which only the server sets")
    if catalog is None:
        raise RouteError("expected no `steering`: no SAE is served here", reason="not_configured")
    if carried is not None:
        if SPEC_KEY in extra:
            raise RequestError("expected `steering` once, got it in the body and in `vllm_xargs`")
        return carried.plan, carried.ticket if carried.spec.report else ""
    value, ticket = extra[SPEC_KEY], extra.get(TICKET_KEY, request_id)
    text = value if isinstance(value, str) else None
    if not isinstance(ticket, str) or len(ticket) > 256:
        raise RequestError(f"expected `{TICKET_KEY}` to be a short string")
    if text is None:
        spec = parse_spec(value)
        return compile_plan(spec, catalog), ticket if spec.report else ""
    plan, report = _compiled(text, catalog)
    return plan, ticket if report else ""


_CACHE: dict[tuple[int, str], tuple[Plan, bool]] = {}


def _compiled(text: str, catalog: Catalog) -> tuple[Plan, bool]:
    """Plans of JSON text, remembered: applications send the same few plans again and again."""
    key = (id(catalog), text)
    if key not in _CACHE:
        spec = parse_spec_json(text)
        if len(_CACHE) >= 1024:
            _CACHE.clear()
        _CACHE[key] = compile_plan(spec, catalog), spec.report
    return _CACHE[key]


def _check_params(params: Any) -> None:
    if not isinstance(params, SamplingParams):
        raise RouteError("expected `steering` on a generating route only", reason="route")


def _check_request(request: Any) -> None:
    if request.prompt_embeds is not None:
        raise RouteError(
            "expected no `steering` beside prompt embeddings, which have no tokens", reason="route"
        )
    if request.resumable:
        raise RouteError("expected no `steering` on a resumable session, whose prompt grows", reason="route")
