"""The one choke point: requests of every route, and of offline `LLM`, become plans here or are refused."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from steerserve import compiling
from steerserve.carried import CARRIED, Carried
from steerserve.catalog import Catalog
from steerserve.compile import compile_plan
from steerserve.errors import RequestError, RouteError
from steerserve.metrics import count_rejection, observe_admission
from steerserve.plan import Plan
from steerserve.policy.enforcement import Caller, Enforcement, Merged
from steerserve.spec import SteeringSpec, parse_spec, parse_spec_json

from . import front_end
from .seams import wrap
from .setup import catalog_for, check_engine, config_for, enforcement_for
from .unread import check_params, check_prompt

__all__ = ["PLAN_KEY", "SPEC_KEY", "TICKET_KEY", "install", "plan_of"]

# Keys of `SamplingParams.extra_args`: what a client may set, and what only admission sets.
SPEC_KEY = "steering"
TICKET_KEY = "steering_ticket"
PLAN_KEY = "steerserve"

_CATALOG = "_steerserve_catalog"
_ENFORCEMENT = "_steerserve_enforcement"
_MODELS = "_steerserve_models"


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
            _read_ahead()
        catalog = catalog_for(vllm_config)
        if catalog is not None:
            catalog.identify()
        setattr(self, _CATALOG, catalog)
        setattr(self, _ENFORCEMENT, enforcement_for(vllm_config))
        setattr(self, _MODELS, _served_names(vllm_config.model_config))
        original(self, vllm_config, *args, **kwargs)
        self.process_inputs_async = _in_thread_with_context(self.process_inputs, self.renderer._executor)

    return init


def _served_names(model_config: Any) -> tuple[str, ...]:
    names = model_config.served_model_name or model_config.model
    return (names,) if isinstance(names, str) else tuple(names)


def _in_thread_with_context(function: Callable[..., Any], executor: Any) -> Callable[..., Any]:
    """As vLLM's `make_async`, but the thread sees the caller's context, where the steering travels."""

    def call(*args: Any, **kwargs: Any) -> Any:
        context = contextvars.copy_context()
        bound = functools.partial(context.run, function, *args, **kwargs)
        return asyncio.get_running_loop().run_in_executor(executor, bound)

    return call


@functools.cache
def _read_ahead() -> None:
    """vLLM admits on the event loop: what that needs of the disk is read before, in a thread."""
    wrap("add_request_async", _wrap_add_request)


def _wrap_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_request(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        catalog: Catalog | None = getattr(self.input_processor, _CATALOG)
        asked = (getattr(params, "extra_args", None) or {}).get(SPEC_KEY)
        if asked is not None and catalog is not None and catalog.reads_disk:
            with suppress(RequestError):  # said again by admission, where a refusal belongs
                await compiling.run(_compiled, asked, catalog)
        return await original(self, request_id, prompt, params, *args, **kwargs)

    return add_request


def _wrap_process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        extra = dict(getattr(params, "extra_args", None) or {})
        carried = CARRIED.get()
        asks = (carried is not None and carried.own is not None) or extra.keys() & _OURS
        started = time.perf_counter()
        lora = args[2] if len(args) > 2 else kwargs.get("lora_request")
        try:
            check_prompt(self, prompt)
            check_params(self, params, _OURS)
            if not asks and getattr(self, _ENFORCEMENT) is None:
                return original(self, request_id, prompt, params, *args, **kwargs)
            merged, ticket = _admit(self, extra, request_id, lora)
            if merged.plan is None:
                return original(self, request_id, prompt, params, *args, **kwargs)
            _check_params(params)
            spent = time.perf_counter() - started + (carried.seconds if carried is not None else 0.0)
            request = original(self, request_id, prompt, params, *args, **kwargs)
            _check_request(request)
        except RequestError as error:
            if carried is not None:
                carried.refused = error
            else:
                count_rejection(error.reason)
            raise VLLMValidationError(str(error), parameter=error.param) from error
        _put(request.sampling_params, extra, merged.plan, ticket)
        if carried is not None:
            carried.admitted += 1
            carried.merged = merged
        observe_admission(merged.plan, spent)
        return request

    return process_inputs


_OURS = {SPEC_KEY, TICKET_KEY, PLAN_KEY}


def _put(params: SamplingParams, extra: dict[str, Any], plan: Plan, ticket: str) -> None:
    kept = {key: value for key, value in extra.items() if key not in _OURS}
    params.extra_args = {**kept, PLAN_KEY: {"plan": plan.wire, "ticket": ticket}}
    if plan.needs_history:
        params.skip_reading_prefix_cache = True


def _admit(processor: Any, extra: dict[str, Any], request_id: str, lora: Any) -> tuple[Merged, str]:
    """What the request's own steering and the policies in force make of it, and the name of its report."""
    carried, catalog = CARRIED.get(), getattr(processor, _CATALOG)
    enforcement: Enforcement | None = getattr(processor, _ENFORCEMENT)
    models = (lora.lora_name,) if lora is not None else getattr(processor, _MODELS)
    if carried is not None:
        carried.model = models[0]
    own, ticket = _own(extra, carried, catalog, request_id)
    if enforcement is None:
        return Merged(own), ticket
    known = carried.in_force if carried is not None else None
    in_force = known if known is not None else enforcement.current()
    merged = in_force.merge(own, replace(carried.caller if carried is not None else Caller(), models=models))
    return merged, carried.ticket if carried is not None else ticket


def _own(
    extra: dict[str, Any], carried: Carried | None, catalog: Catalog | None, request_id: str
) -> tuple[Plan | None, str]:
    """What the request itself asks for, by its body or by `extra_args`."""
    if PLAN_KEY in extra or (TICKET_KEY in extra and SPEC_KEY not in extra):
        raise RequestError(f"expected no `{PLAN_KEY}` in extra_args, which only the server sets")
    in_body = carried is not None and carried.own is not None
    if not in_body and SPEC_KEY not in extra:
        return None, ""
    if catalog is None:
        raise RouteError("expected no `steering`: no SAE is served here", reason="not_configured")
    if in_body and SPEC_KEY in extra:
        raise RequestError("expected `steering` once, got it in the body and in `vllm_xargs`")
    if in_body and carried is not None:
        return carried.own, carried.ticket
    ticket = extra.get(TICKET_KEY, request_id)
    if not isinstance(ticket, str) or len(ticket) > 256:
        raise RequestError(f"expected `{TICKET_KEY}` to be a short string")
    spec, plan = _compiled(extra[SPEC_KEY], catalog)
    if carried is None:
        return plan, ticket if spec.report else ""
    carried.check(plan, catalog)
    carried.spec = spec
    return plan, carried.ticket


# A longer text is compiled each time: a thousand of the longest would be kept for gigabytes.
_MOST_REMEMBERED = 8192


def _compiled(value: object, catalog: Catalog) -> tuple[SteeringSpec, Plan]:
    """Plans of JSON text are remembered: applications send the same few plans again and again."""
    if not isinstance(value, str):
        spec = parse_spec(value)
        return spec, compile_plan(spec, catalog)
    return _remembered(value, catalog) if len(value) <= _MOST_REMEMBERED else _of_text(value, catalog)


def _of_text(text: str, catalog: Catalog) -> tuple[SteeringSpec, Plan]:
    spec = parse_spec_json(text)
    return spec, compile_plan(spec, catalog)


# Asked by the event loop and by vLLM's threads at once, which functools' cache is made for.
_remembered = functools.lru_cache(maxsize=1024)(_of_text)


def _check_params(params: Any) -> None:
    if not isinstance(params, SamplingParams):
        raise RouteError("expected `steering`, and policies, on generating routes only", reason="route")


def _check_request(request: Any) -> None:
    if request.prompt_embeds is not None:
        message = "expected no prompt embeddings, which have no tokens, beside `steering` or a policy"
        raise RouteError(message, reason="route")
    if request.resumable:
        message = "expected no resumable session, whose prompt grows, beside `steering` or a policy"
        raise RouteError(message, reason="route")
