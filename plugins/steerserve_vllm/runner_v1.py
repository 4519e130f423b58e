"""The V1 model runner drives the runtime: which requests a step holds, and where each of them stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.outputs import ModelRunnerOutput

from .admission import plan_of
from .attach import attach, attached_to
from .seams import wrap

if TYPE_CHECKING:
    from steerserve.runtime.host import HostRuntime

__all__ = ["install"]

_STEP = "_steerserve_step"


def install() -> None:
    """Wrap the runner's seams."""
    wrap("load_model", _wrap_load_model)
    wrap("load_model_cpu", _wrap_load_model)
    wrap("update_states", _wrap_update_states)
    wrap("model_forward", _wrap_model_forward)
    wrap("sample_tokens", _wrap_sample_tokens)


def _open_runtime(*args: Any, **sizes: Any) -> HostRuntime:
    # Not at the top: see `attach`.
    from steerserve.runtime.host import HostRuntime

    return HostRuntime(*args, **sizes)


def _wrap_load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        attach(self, self.vllm_config, self.model, self.device, _open_runtime)
        return result

    return load_model


def _wrap_update_states(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_states(self: Any, scheduler_output: Any) -> Any:
        attached = attached_to(self)
        if attached is None:
            return original(self, scheduler_output)
        runtime: HostRuntime = attached.runtime
        going_on = scheduler_output.scheduled_cached_reqs
        runtime.settle(dict(zip(going_on.req_ids, going_on.num_computed_tokens, strict=True)))
        for request_id in scheduler_output.finished_req_ids:
            runtime.remove(request_id)
        result = original(self, scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            admitted = plan_of(new.sampling_params)
            if admitted is not None:
                prompt = np.asarray(new.prompt_token_ids, dtype=np.int64)
                runtime.add(new.req_id, admitted[0], prompt, admitted[1], new.num_computed_tokens)
        setattr(self, _STEP, scheduler_output)
        return result

    return update_states


def _wrap_model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        attached = attached_to(self)
        if attached is None:
            return original(self, *args, **kwargs)
        runtime: HostRuntime = attached.runtime
        capture = attached.capture
        if not (runtime.is_active or capture):
            return original(self, *args, **kwargs)
        step = getattr(self, _STEP)
        request_ids = self.input_batch.req_ids
        scheduled = np.array([step.num_scheduled_tokens[r] for r in request_ids], dtype=np.int32)
        computed = self.input_batch.num_computed_tokens_cpu[: len(request_ids)]
        token_ids = self.input_ids.cpu.numpy()
        drafts = None
        if step.scheduled_spec_decode_tokens:
            spec = step.scheduled_spec_decode_tokens
            drafts = np.array([len(spec.get(r, ())) for r in request_ids], dtype=np.int32)
        runtime.begin_step(request_ids, scheduled, computed.astype(np.int32), token_ids, drafts)
        if capture is not None:
            capture.begin_step(request_ids, scheduled, computed, token_ids)
        try:
            return original(self, *args, **kwargs)
        finally:
            runtime.end_step()
            if capture is not None:
                capture.end_step()

    return model_forward


def _wrap_sample_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        output = original(self, grammar_output)
        attached = attached_to(self)
        # Of several pipeline stages the last one samples; the others hear of it with the next step.
        if (
            attached is not None
            and isinstance(output, ModelRunnerOutput)
            and getattr(self, _STEP).scheduled_spec_decode_tokens
        ):
            sampled = zip(output.req_ids, output.sampled_token_ids, strict=False)
            runtime: Any = attached.runtime
            runtime.accept({name: max(0, len(tokens) - 1) for name, tokens in sampled})
        return output

    return sample_tokens
