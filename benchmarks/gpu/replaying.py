"""A small decoder with the op behind two layers, run from graphs and eagerly, on requests that come and go.

Two runtimes are told the same. One's forward passes are replays of graphs that were recorded once a size, as
vLLM's are; the other's run as Python says. Every output has to be the same to the last bit.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steerserve.catalog import Catalog
from steerserve.runtime.device import DeviceRuntime

from .catalog import LAYERS, small_catalog
from .timing import recorded

__all__ = ["run"]

_WIDTH, _VOCAB, _POINTS = 64, 320, (2, 3)
_MOST_REQUESTS, _SIZES = 4, (8, 16, 32)
# The host is at most so many steps ahead of the device.
_AHEAD = 2


@dataclass
class _Request:
    """A request of the unit tests' scheduler, and how far it has got."""

    asked: Any
    computed: int = 0
    spans: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.asked.ids) - self.computed


class Rig:
    """A runtime, and the decoder that it steers. Args: graphed: whether passes are replayed from graphs."""

    def __init__(self, catalog: Catalog, device: str, graphed: bool) -> None:
        sizes = {"max_requests": _MOST_REQUESTS, "max_tokens": _SIZES[-1], "vocab": _VOCAB}
        self.runtime = DeviceRuntime(catalog, _POINTS, device=device, **sizes)
        generator = torch.Generator().manual_seed(0)
        self.weights = [
            (torch.randn(_WIDTH, _WIDTH, generator=generator) * _WIDTH**-0.5).to(device, torch.bfloat16)
            for _ in range(LAYERS)
        ]
        self.input = torch.zeros(_SIZES[-1], _WIDTH, device=device, dtype=torch.bfloat16)
        self.output = torch.zeros_like(self.input)
        self._graphs = {size: recorded(lambda size=size: self._pass(size)) for size in _SIZES if graphed}  # type: ignore[misc]

    def forward(self, tokens: int) -> Tensor:
        """One pass over the first tokens of `input`, padded to a size that there is a graph of."""
        size = next(size for size in _SIZES if size >= tokens)
        if size in self._graphs:
            self._graphs[size].replay()
        else:
            self._pass(size)
        return self.output[:tokens]

    def _pass(self, size: int) -> None:
        hidden, residual = self.input[:size].clone(), torch.zeros_like(self.input[:size])
        for number, weight in enumerate(self.weights, 1):
            residual = residual + hidden
            hidden = F.silu(F.linear(F.rms_norm(residual, (_WIDTH,)), weight))
            if number in _POINTS:
                self.runtime.steer(number, residual, hidden)
        self.output[:size] = residual + hidden


class _Trial:
    """The rigs, and the requests that live in both."""

    def __init__(self, rigs: Sequence[Rig], catalog: Catalog, device: str) -> None:
        from tests.unit.test_history import random_request

        self.rigs, self.device, self.rng = rigs, device, random.Random(0)
        self._new: Callable[[str], Any] = partial(random_request, self.rng, catalog)
        self.live: list[_Request] = []
        self.begun = 0
        self.apart = torch.zeros((), dtype=torch.int64, device=device)
        self.marks: list[Any] = []

    def step(self) -> None:
        """Requests join, some take part, some drafts are rejected, and some end."""
        while len(self.live) < _MOST_REQUESTS and self.rng.random() < 0.5:
            self._join()
        batch = [request for request in self.live if self.rng.random() < 0.8]
        if not batch:
            return
        counts = [self.rng.randint(1, min(request.left, 8)) for request in batch]
        stand = [self.rng.randint(1, n) if self.rng.random() < 0.3 else n for n in counts]
        self._forward(batch, counts, stand)
        for request, stood in zip(batch, stand, strict=True):
            request.computed += stood
            if request.left == 0:
                self.live.remove(request)
                for rig in self.rigs:
                    rig.runtime.remove(request.asked.name)
        self._keep_pace()

    def _join(self) -> None:
        asked = self._new(f"r{self.begun}")
        self.begun += 1
        prompt = torch.tensor(asked.ids[: asked.prompt_len]).numpy()
        for rig in self.rigs:
            rig.runtime.add(asked.name, asked.plan.wire, prompt, asked.name, 0)
        self.live.append(_Request(asked))

    def _forward(self, batch: Sequence[_Request], counts: Sequence[int], stand: Sequence[int]) -> None:
        starts = self._there(torch.tensor([0, *counts]).cumsum(0).int())
        spans = list(zip(batch, counts, strict=True))
        positions = self._there(torch.cat([torch.arange(r.computed, r.computed + n) for r, n in spans]))
        ids = self._there(torch.tensor([t for r, n in spans for t in r.asked.ids[r.computed :][:n]]).int())
        stands = self._there(torch.tensor([r.computed + n for r, n in zip(batch, stand, strict=True)]))
        tokens = sum(counts)
        given = torch.randn(tokens, _WIDTH, generator=torch.Generator().manual_seed(self.rng.getrandbits(32)))
        outputs = []
        for rig in self.rigs:
            rig.input[:tokens] = self._there(given.to(torch.bfloat16))
            rig.runtime.begin_step([r.asked.name for r in batch], starts, positions, ids)
            outputs.append(rig.forward(tokens))
            rig.runtime.settle(stands)
            rig.runtime.end_step()
        self.apart += (outputs[0] != outputs[1]).any()

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor if self.device == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def _keep_pace(self) -> None:
        if self.device == "cpu":
            return
        self.marks.append(torch.cuda.Event())
        self.marks[-1].record()
        if len(self.marks) > _AHEAD:
            self.marks.pop(0).synchronize()

    def reports(self) -> list[Any]:
        """What each rig's runtime counted of all requests, those that live too."""
        tickets: dict[str, dict[str, int]] = {f"r{number}": {} for number in range(self.begun)}
        return [rig.runtime.collect(tickets)["tallies"] for rig in self.rigs]


def run(device: str, steps: int) -> dict[str, Any]:
    """Returns: how many requests there were in so many steps.

    Raises: AssertionError if an output or a report differs.
    """
    with tempfile.TemporaryDirectory() as folder:
        catalog = small_catalog(Path(folder), _WIDTH)
        rigs = [Rig(catalog, device, graphed=device != "cpu"), Rig(catalog, device, graphed=False)]
        trial = _Trial(rigs, catalog, device)
        for _ in range(steps):
            trial.step()
        one, other = trial.reports()
    assert int(trial.apart) == 0, f"{int(trial.apart)} of {steps} steps are not the same to the last bit"
    assert one == other, "what the runtimes counted differs"
    return {"steps": steps, "requests": trial.begun}
