"""What the front end may ask of the workers, over `collective_rpc`, and the V2 runner's seams in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.worker.worker_base import WorkerBase

from . import guard, harvest_worker, runner_v2, seams
from .attach import attached_to_runner
from .setup import config_for

__all__ = ["install"]


def install() -> None:
    """Add the methods to every worker class; wrap the V2 runner in workers that use it; guard their start."""
    WorkerBase.steerserve_collect = _collect
    harvest_worker.install()
    seams.wrap("worker_init", _wrap_worker_init)


def _wrap_worker_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        configured = config_for(vllm_config) is not None
        if configured and vllm_config.use_v2_model_runner:
            runner_v2.install()
        original(self, vllm_config, *args, **kwargs)
        if configured:
            self.compile_or_warm_up_model = guard.guarded(self)

    return init


def _collect(self: Any, tickets: list[str] | dict[str, dict[str, int]]) -> dict[str, Any]:
    """Reports of the named tickets, and totals since the start, with the worker's place in the engine.

    Args: tickets: with their requests' ends, or without (see `Runtime.collect`).
    """
    attached = attached_to_runner(self.model_runner)
    if attached is None:
        return {}
    parallel = self.parallel_config
    pp_rank, tp_rank = divmod(parallel.rank, parallel.tensor_parallel_size)
    place = {"pp_rank": pp_rank, "tp_rank": tp_rank, "dp_rank": parallel.data_parallel_rank}
    ends = tickets if isinstance(tickets, dict) else {ticket: {} for ticket in tickets}
    return {**attached.runtime.collect(ends), **place}
