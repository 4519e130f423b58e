"""A device runtime driven as vLLM's V2 runner drives it, at random; its input buffers stay where they are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steerserve.plan import Plan
from steerserve.runtime.device import DeviceRuntime
from tests.support.models import VOCAB

__all__ = ["MAX_REQUESTS", "MAX_TOKENS", "SIZES", "Step", "Worker"]

MAX_REQUESTS, MAX_TOKENS = 3, 12
# To which steps are padded.
SIZES = (4, 8, 12)


@dataclass(frozen=True)
class Step:
    """A step that has begun: its tokens, and to how many it is padded."""

    tokens: int
    size: int


class Worker:
    """Requests that come, run, are preempted and end; more of them live than can run at once."""

    def __init__(self, runtime: DeviceRuntime, plans: Sequence[Plan], seed: int) -> None:
        self.runtime, self.plans, self.rng = runtime, plans, random.Random(seed)
        device = runtime.device
        self.starts = torch.zeros(MAX_REQUESTS + 1, dtype=torch.int32, device=device)
        self.positions = torch.zeros(MAX_TOKENS, dtype=torch.int64, device=device)
        self.ids = torch.zeros(MAX_TOKENS, dtype=torch.int32, device=device)
        self.stands = torch.zeros(MAX_REQUESTS, dtype=torch.int64, device=device)
        self.live: dict[str, int] = {}
        self.names = 0
        self.most_live = 0

    def begin(self) -> Step:
        """Some requests come, some go; the others' next tokens are laid out and told to the runtime."""
        while len(self.live) < self.rng.randint(1, 4 * MAX_REQUESTS):
            self._add(self.rng.choice(self.plans))
        for name in self.rng.sample(sorted(self.live), self.rng.randint(0, len(self.live) // 3)):
            self.end(name)
        self.most_live = max(self.most_live, len(self.live))
        batch = self.rng.sample(sorted(self.live), self.rng.randint(0, min(MAX_REQUESTS, len(self.live))))
        names = [*batch, "plain"][:MAX_REQUESTS]
        counts = [self.rng.randint(1, MAX_TOKENS // MAX_REQUESTS) for _ in names]
        for name in names:
            if name in self.live and self.rng.random() < 0.2:
                self.live[name] = self.rng.randint(0, self.live[name])
        begins = [self.live.get(name, 0) for name in names]
        tokens = sum(counts)
        size = next(size for size in SIZES if size >= tokens)
        positions = [at + i for at, count in zip(begins, counts, strict=True) for i in range(count)]
        # Behind the step's own tokens stand those of earlier ones.
        _put(self.positions, positions)
        _put(self.ids, [self.rng.randrange(VOCAB) for _ in positions])
        _put(self.starts, [0, *np.cumsum(counts)])
        starts = self.starts[: len(names) + 1]
        self.runtime.begin_step(names, starts, self.positions[:size], self.ids[:size])
        for name, at, count in zip(names, begins, counts, strict=True):
            if name in self.live:
                self.live[name] = at + count
        return Step(tokens, size)

    def finish(self) -> None:
        """The step is over, and perhaps nothing is steered until the next one."""
        names = self.runtime._batch_ids or []
        _put(self.stands, [self.live.get(name, 0) for name in names])
        self.runtime.settle(self.stands[: len(names)])
        if self.runtime.may_abort:
            self.runtime.notes()
        if self.rng.random() < 0.3:
            self.runtime.end_step()

    def end(self, name: str) -> None:
        self.runtime.remove(name)
        del self.live[name]

    def _add(self, plan: Plan) -> None:
        self.names += 1
        name = f"request-{self.names}"
        prompt = np.array([self.rng.randrange(VOCAB) for _ in range(self.rng.randint(1, 12))])
        self.runtime.add(name, plan.wire, prompt, name, 0)
        self.live[name] = 0


def _put(buffer: torch.Tensor, values: Sequence[int]) -> None:
    """What vLLM's own kernels do, and so no matter of the runtime's."""
    if not buffer.is_meta:
        buffer[: len(values)] = torch.tensor(values)
