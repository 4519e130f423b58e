"""The op inside a decode loop recorded whole in a CUDA graph, against the same loop without it, in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from steerserve.steer import History, PointBuffers
from steerserve.steer.triton import hold_triton, note_triton, steer_triton

from ..summary import Spread
from .kernel import ROWS
from .model import Cache, Decoder, Hook
from .plans import random_plans
from .timing import milliseconds, recorded

__all__ = ["VARIANTS", "measure"]

UNHOOKED = "unhooked"
VARIANTS = ("idle", "one plan", "plans")
_STEPS_OF_A_TURN = 20


class Hooked:
    """The op behind `layers` layers, evenly spread: buffers of its own for each, one token map for all."""

    def __init__(self, decoder: Decoder, batch: int, layers: int) -> None:
        width, every = decoder.shape.hidden, decoder.shape.layers // layers
        self.slot = torch.full((batch,), -1, dtype=torch.int32, device="cuda")
        rows = torch.full((batch,), -1, dtype=torch.int64, device="cuda")
        self.hooks: dict[int, Hook] = {}
        for layer in range(every // 2, every * layers, every):
            plans = random_plans(batch, ROWS, width, "cuda")
            trace = torch.empty(batch, ROWS, 2, device="cuda")
            self.hooks[layer] = partial(
                _steer,
                plans=plans,
                slot=self.slot,
                rows=rows,
                trace=trace,
                history=History.blank(batch, "cuda"),
            )

    def use(self, variant: str) -> None:
        """Steer as the variant says: the recorded graph stays, what its buffers hold changes."""
        each = torch.arange(len(self.slot), dtype=torch.int32, device="cuda")
        self.slot.copy_({"idle": each * 0 - 1, "one plan": each * 0, "plans": each}[variant])


def _steer(
    stream: torch.Tensor,
    addend: torch.Tensor | None,
    *,
    plans: PointBuffers,
    slot: torch.Tensor,
    rows: torch.Tensor,
    trace: torch.Tensor,
    history: History,
) -> None:
    """The three launches that stand behind a layer."""
    note_triton(stream, addend, plans, slot, rows, history)
    steer_triton(stream, addend, plans, slot, rows, trace, history)
    hold_triton(stream, addend, plans, slot, trace, history)


def measure(
    decoder: Decoder, batch: int, hooked: Sequence[int], rounds: int, advance: Callable[[str], None]
) -> dict[str, Any]:
    """Milliseconds of a decode step of every variant, and ratios to the unhooked loop of the same round.

    Args:
        hooked: how many layers have the op behind them; each number is measured by itself.
        advance: told the variant before each turn.
    """
    cache = Cache(decoder.shape, batch, "cuda", torch.bfloat16)
    points = {layers: Hooked(decoder, batch, layers) for layers in hooked}
    graphs = {0: recorded(partial(decoder.step, cache, {}))}
    graphs |= {layers: recorded(partial(decoder.step, cache, own.hooks)) for layers, own in points.items()}
    turns: list[tuple[str, int]] = [(UNHOOKED, 0), *((v, layers) for layers in hooked for v in VARIANTS)]
    spent: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
    for number in range(-1, rounds):
        shift = number % len(turns)
        for variant, layers in [*turns[shift:], *turns[:shift]]:
            advance(f"batch {batch}, {variant}")
            if layers:
                points[layers].use(variant)
            graphs[layers].replay()
            took = milliseconds(graphs[layers].replay, _STEPS_OF_A_TURN)
            # The first round warms up.
            spent[variant, layers] += [took] if number >= 0 else []
    found = [_summary(variant, layers, spent) for variant, layers in turns]
    return {"batch": batch, "rounds": rounds, "variants": found}


def _summary(variant: str, layers: int, spent: dict[tuple[str, int], list[float]]) -> dict[str, Any]:
    own = spent[variant, layers]
    ratios = [mine / base for mine, base in zip(own, spent[UNHOOKED, 0], strict=True)]
    return {
        "variant": variant,
        "hooked_layers": layers,
        "milliseconds": asdict(Spread.of(own)),
        "ratio": asdict(Spread.of(ratios)),
    }
