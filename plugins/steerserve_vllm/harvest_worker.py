"""What a harvest asks of the workers, over `collective_rpc`: begin, one batch after the other, close."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.v1.worker.worker_base import WorkerBase

from steerserve.errors import SteerserveError
from steerserve.training.capture import Capture
from steerserve.training.part import Part
from steerserve.training.shard_writer import ShardWriter

from .attach import attached_to_runner

__all__ = ["METHODS", "install"]

Answer = tuple[Any, str | None]


def install() -> None:
    """Add the methods to every worker class."""
    for name, method in METHODS.items():
        setattr(WorkerBase, name, method)


def _answering(method: Callable[..., Any]) -> Callable[..., Answer]:
    """Return (result, None), or (None, message) for what went wrong: an exception would lose its class.

    A worker that harvests nothing (of another tensor-parallel rank or pipeline stage) answers (None, None).
    """

    @functools.wraps(method)
    def answer(self: Any, *args: Any) -> Answer:
        attached = attached_to_runner(self.model_runner)
        if attached is None or attached.capture is None:
            return None, None
        try:
            return method(self, attached.capture, *args), None
        except SteerserveError as error:
            attached.capture.abandon()
            return None, str(error)

    return answer


@_answering
def _open(
    self: Any,
    capture: Capture,
    folders: list[tuple[int, str]],
    capacity: int,
    rows_per_shard: int,
    resume: bool,
    part: tuple[int, int],
) -> None:
    """Args: folders: (layer, folder of its shards). capacity: the most tokens of a batch."""
    model = self.model_config
    place = dict(folders)
    writers = {
        point: ShardWriter(
            Path(place[hook.layer]),
            model.get_hidden_size(),
            hook=hook,
            model=str(model.model),
            dtype="float32" if str(model.dtype) == "torch.float32" else "bfloat16",
            rows_per_shard=rows_per_shard,
            resume=resume,
        )
        for point, hook in capture.hooks.items()
    }
    capture.open(writers, capacity, Part(*part))


@_answering
def _begin_batch(
    self: Any, capture: Capture, request: int, sequence: int, lengths: list[int], tokens: bytes
) -> bool:
    return capture.begin_batch(request, sequence, lengths, tokens)


@_answering
def _end_batch(self: Any, capture: Capture) -> None:
    capture.end_batch()


@_answering
def _close(self: Any, capture: Capture) -> int:
    return capture.close()


@_answering
def _abandon(self: Any, capture: Capture) -> None:
    capture.abandon()


METHODS = {
    "steerserve_harvest_open": _open,
    "steerserve_harvest_begin_batch": _begin_batch,
    "steerserve_harvest_end_batch": _end_batch,
    "steerserve_harvest_close": _close,
    "steerserve_harvest_abandon": _abandon,
}
