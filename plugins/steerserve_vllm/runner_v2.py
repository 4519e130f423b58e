"""The V2 model runner drives the runtime through its model state, whichever class vLLM picks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import ending
from .admission import plan_of
from .attach import attach
from .seams import V2_SEAMS, check, wrap
from .setup import config_for

if TYPE_CHECKING:
    from steerserve.runtime.device import DeviceRuntime

__all__ = ["install"]

_installed = False


def install() -> None:
    """Wrap the choice of the model state, and what tells a preempted request from one that ended; once.

    Raises: IncompatibleError if this vLLM's V2 runner differs from what is wrapped.
    """
    global _installed
    if _installed:
        return
    check(V2_SEAMS)
    _installed = True
    wrap("model_state_class", _wrap_model_state_class)
    wrap("finish_requests", _wrap_finish_requests)
    ending.install_v2()


def _open_runtime(*args: Any, **sizes: Any) -> DeviceRuntime:
    # Not at the top: see `attach`.
    from steerserve.runtime.device import DeviceRuntime

    return DeviceRuntime(*args, **sizes)


def _wrap_model_state_class(original: Callable[..., Any]) -> Callable[..., Any]:
    def resolve_model_state_cls(vllm_config: Any, model: Any) -> type[Any]:
        chosen: type[Any] = original(vllm_config, model)
        if config_for(vllm_config) is None:
            return chosen
        return type(f"Steered{chosen.__name__}", (_Steered, chosen), {"__module__": __name__})

    return resolve_model_state_cls


def _wrap_finish_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    def finish_requests(self: Any, scheduler_output: Any) -> Any:
        # vLLM also calls `remove_request` for preempted requests, which come back under the same id.
        if isinstance(self.model_state, _Steered):
            self.model_state.finish(scheduler_output.finished_req_ids)
        return original(self, scheduler_output)

    return finish_requests


class _Steered:
    """Mixed into a vLLM ModelState: every hook does what vLLM's does, and tells the runtime."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)  # type: ignore[call-arg]
        attached = attach(self, vllm_config, model, device, _open_runtime)
        assert attached is not None
        self._steering = attached.runtime
        self._steering.warm_up(vllm_config.model_config.dtype)
        self._capture = attached.capture
        self._begun = False

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        admitted = plan_of(new_req_data.sampling_params)
        if admitted is not None:
            tokens = new_req_data.prefill_token_ids[: new_req_data.prompt_len]
            prompt = np.asarray(tokens, dtype=np.int64)
            computed = new_req_data.num_computed_tokens
            self._steering.add(new_req_data.req_id, admitted[0], prompt, admitted[1], computed)

    def finish(self, request_ids: Iterable[str]) -> None:
        """These requests have ended, however they did."""
        for request_id in request_ids:
            self._steering.remove(request_id)

    def preprocess_state(self, input_batch: Any, *args: Any, **kwargs: Any) -> None:
        """Only real batches come here; dummy runs go straight to `prepare_inputs`."""
        super().preprocess_state(input_batch, *args, **kwargs)  # type: ignore[misc]
        self._steering.begin_step(
            input_batch.req_ids, input_batch.query_start_loc, input_batch.positions, input_batch.input_ids
        )
        if self._capture is not None:
            n = input_batch.num_tokens
            self._capture.begin_step(
                input_batch.req_ids,
                input_batch.num_scheduled_tokens,
                input_batch.num_computed_tokens_np,
                input_batch.input_ids[:n].cpu().numpy(),
            )
        self._begun = True

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
        if not self._begun:
            self._end_step()
        self._begun = False
        return super().prepare_inputs(input_batch, req_states)  # type: ignore[misc]

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> Any:
        self._end_step()
        return super().prepare_dummy_inputs(num_reqs, num_tokens)  # type: ignore[misc]

    def postprocess_state(self, idx_mapping: Any, num_sampled: Any, *args: Any, **kwargs: Any) -> None:
        super().postprocess_state(idx_mapping, num_sampled, *args, **kwargs)  # type: ignore[misc]
        computed = args[0] if args else kwargs.get("num_computed_tokens")
        if computed is not None and self._settles_here:
            self._steering.settle(computed[idx_mapping])

    @property
    def _settles_here(self) -> bool:
        """The last pipeline stage learns at once which drafts stand; the others hear of older steps."""
        from vllm.distributed.parallel_state import get_pp_group

        return bool(get_pp_group().is_last_rank)

    def _end_step(self) -> None:
        self._steering.end_step()
        if self._capture is not None:
            self._capture.end_step()
