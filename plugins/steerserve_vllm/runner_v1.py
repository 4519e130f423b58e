"""The V1 model runner drives the runtime: which requests a step holds, and where each of them stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from steerserve.hookpoint import HookPoint

from .admission import plan_of
from .seams import wrap
from .setup import catalog_for, check_engine, config_for

if TYPE_CHECKING:
    from steerserve.runtime import Runtime
    from steerserve.training.capture import Capture

__all__ = ["capture_of", "install", "runtime_of"]

_RUNTIME = "_steerserve_runtime"
_CAPTURE = "_steerserve_capture"
_STEP = "_steerserve_step"


def install() -> None:
    """Wrap the runner's three seams."""
    wrap("load_model", _wrap_load_model)
    wrap("load_model_cpu", _wrap_load_model)
    wrap("update_states", _wrap_update_states)
    wrap("model_forward", _wrap_model_forward)


def runtime_of(runner: Any) -> Runtime | None:
    """The steering state of a model runner; None where nothing is steered."""
    return getattr(runner, _RUNTIME, None)


def capture_of(runner: Any) -> Capture | None:
    """What harvests on this model runner, if anything does."""
    return getattr(runner, _CAPTURE, None)


def _wrap_load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if not hasattr(self, _RUNTIME):
            _attach(self)
        return result

    return load_model


def _attach(runner: Any) -> None:
    # Not at the top: numba must not be loaded while vLLM's CPU workers scan every module for kernels, and
    # model classes not before vLLM asks for them.
    from steerserve.runtime import Runtime

    from .harvest import open_capture
    from .layers import find_layers, hook_points
    from .op import bind

    vllm_config = runner.vllm_config
    catalog = catalog_for(vllm_config)
    config = config_for(vllm_config)
    if catalog is None or config is None:
        return
    check_engine(vllm_config)
    layers = find_layers(runner.model, catalog.n_layers)
    points = [point.index for point in catalog.points]
    harvest = config.harvest
    if harvest is not None:
        harvest_point = HookPoint.of(harvest.layer, harvest.hook, catalog.n_layers)
        points.append(harvest_point.index)
    here = hook_points(layers, points, catalog.d_model)
    runtime = Runtime(
        catalog,
        [point for point in here if HookPoint(point) in catalog.points],
        max_requests=runner.max_num_reqs,
        max_tokens=runner.max_num_tokens,
        vocab=runner.model_config.get_vocab_size(),
    )
    capture = None
    if harvest is not None and harvest_point.index in here and _is_first_rank(runner):
        capture = open_capture(runner, harvest, harvest_point, catalog)
    setattr(runner, _RUNTIME, runtime)
    setattr(runner, _CAPTURE, capture)
    bind(runner, runtime, capture)


def _is_first_rank(runner: Any) -> bool:
    """Tensor-parallel ranks see the same stream; one of them writes it."""
    return int(runner.parallel_config.rank) % int(runner.parallel_config.tensor_parallel_size) == 0


def _wrap_update_states(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_states(self: Any, scheduler_output: Any) -> Any:
        runtime = runtime_of(self)
        if runtime is None:
            return original(self, scheduler_output)
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
        runtime, capture = runtime_of(self), capture_of(self)
        if runtime is None or not (runtime.is_active or capture):
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
