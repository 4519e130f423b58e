"""One SAE over several processes, as `torchrun` starts them: each takes its part of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["World", "join_world"]


@dataclass(frozen=True)
class World:
    """This process among `size`; with one, every method leaves things as they are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def part(self, batch: Tensor) -> Tensor:
        """This process's rows of a [B, d] batch; B is a multiple of the number of processes."""
        return batch if self.size == 1 else batch.chunk(self.size)[self.rank]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in one exchange per dtype."""
        self._exchange(tensors, dist.ReduceOp.SUM, self.size)

    def maximum(self, tensor: Tensor) -> Tensor:
        """The element-wise maximum over the processes; of bools, whether any is true."""
        if self.size == 1:
            return tensor
        numbers = tensor.to(torch.int32)
        self._exchange([numbers], dist.ReduceOp.MAX, 1)
        return numbers.to(tensor.dtype)

    def of_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, in all of them."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def _exchange(self, tensors: Iterable[Tensor], how: dist.ReduceOp.RedOpType, divisor: int) -> None:
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for group in by_dtype.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat, how)
            if divisor > 1:
                flat /= divisor
            for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.copy_(part.view_as(tensor))


@contextmanager
def join_world() -> Iterator[World]:
    """The processes that torchrun started, or this one alone. A process that is done leaves the others."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield World()
        return
    if not dist.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        # Left to the interpreter's end, its threads abort the process now and then.
        dist.destroy_process_group()
