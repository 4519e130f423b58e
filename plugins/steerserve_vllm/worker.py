"""What the front end may ask of the workers, over `collective_rpc`."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.worker_base import WorkerBase

from .runner_v1 import capture_of, runtime_of

__all__ = ["install"]


def install() -> None:
    """Add the methods to every worker class."""
    WorkerBase.steerserve_collect = _collect
    WorkerBase.steerserve_close_capture = _close_capture


def _collect(self: Any, tickets: list[str]) -> dict[str, Any]:
    """Reports of the named tickets, and totals since the start, with the worker's place in the engine."""
    runtime = runtime_of(self.model_runner)
    if runtime is None:
        return {}
    parallel = self.parallel_config
    pp_rank, tp_rank = divmod(parallel.rank, parallel.tensor_parallel_size)
    place = {"pp_rank": pp_rank, "tp_rank": tp_rank, "dp_rank": parallel.data_parallel_rank}
    return {**runtime.collect(tickets), **place}


def _close_capture(self: Any) -> int:
    """Finish harvesting; returns how many activations this worker wrote."""
    capture = capture_of(self.model_runner)
    return capture.close() if capture is not None else 0
