"""Random slots whose rows remember, ask, observe and hold, and a step of tokens through all stages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from steerserve.steer import (
    NEVER,
    History,
    PointBuffers,
    hold_cpu,
    hold_reference,
    note_cpu,
    note_reference,
    steer_cpu,
    steer_reference,
)
from steerserve.steer.buffers import (
    ABORT,
    ASKED,
    BASE,
    CEILING,
    EDIT,
    FORCE,
    HOLD,
    LATCH,
    NORM,
    OBSERVE,
    PLAIN,
    z_bounds,
)
from tests.unit.steer.interpreting import interpreted

__all__ = ["EVERY_OP", "Step", "by_cpu", "by_reference", "by_triton", "random_step", "staged_buffers"]

INF = torch.inf
# bias, threshold, scale, shift, floor: relu, jumprelu, gated, the identity of a direction.
ACTIVATIONS = [
    (0.1, 0.0, 1.0, 0.0, 0.0),
    (0.1, 0.4, 1.0, 0.0, 0.0),
    (0.1, 0.1, 1.7, -0.3, 0.0),
    (0.0, -INF, 1.0, 0.0, -INF),
]
# a, c, lo, hi of the six ops.
EDITS = [
    (0.0, 3.0, -INF, INF),
    (0.0, 0.0, -INF, INF),
    (-1.5, 0.0, -INF, INF),
    (1.0, 2.0, -INF, INF),
    (1.0, 0.0, 1.0, INF),
    (1.0, 0.0, -INF, 0.2),
]
# Of these can be held: ablate and at_most.
CEILINGS = (1, 5)


@dataclass(frozen=True)
class Step:
    """Tokens of one forward pass at one hook point, before it or after it."""

    stream: Tensor
    addend: Tensor | None
    slot: Tensor
    rows: Tensor
    history: History
    trace: Tensor

    def copy(self) -> Step:
        """One that stages may change."""
        notes = replace(self.history, since=self.history.since.clone())
        return replace(
            self,
            stream=self.stream.clone(),
            rows=self.rows.clone(),
            history=notes,
            trace=self.trace.clone(),
        )


def staged_buffers(slots: int, rows: int, width: int, seed: int, *, held: int = 4) -> PointBuffers:
    """Slots of random rows, with NaN wherever nothing may be read; the last slot is empty.

    Args: held: the most rows of a slot that are held.
    """
    generator = torch.Generator().manual_seed(seed)
    buffers = PointBuffers(slots, rows, width)
    for part in (buffers.encoder, buffers.decoder, buffers.params, buffers.above, buffers.below):
        part.fill_(torch.nan)
    for slot in range(slots - 1):
        n = rows if slot == 0 else 1 + int(torch.randint(rows, (), generator=generator))
        _fill(buffers, slot, n, held, generator)
    return buffers


def _fill(buffers: PointBuffers, slot: int, n: int, held: int, generator: torch.Generator) -> None:
    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    width = buffers.encoder.shape[2]
    buffers.count[slot] = n
    buffers.encoder[slot, :n] = torch.nn.functional.normalize(torch.randn(n, width, generator=generator))
    buffers.decoder[slot, :n] = torch.nn.functional.normalize(torch.randn(n, width, generator=generator))
    edits = draw(len(EDITS), n).tolist()
    buffers.params[slot, :n, :9] = torch.tensor(
        [(*ACTIVATIONS[kind], *EDITS[edit]) for kind, edit in zip(draw(4, n).tolist(), edits, strict=True)]
    )
    _fill_gates(buffers, slot, n, generator)
    buffers.row[slot, :n] = torch.randperm(128, generator=generator)[:n].int()
    bits = torch.randperm(64, generator=generator)
    for k in range(n):
        state = (PLAIN, PLAIN, LATCH, LATCH, ABORT, ASKED)[int(draw(6))]
        mode = (OBSERVE, EDIT, FORCE)[int(draw(3))]
        if edits[k] in CEILINGS and state in (PLAIN, LATCH) and held > 0:
            mode, held = HOLD, held - 1
        if state in (ABORT, ASKED):
            mode = OBSERVE
        # Rows share bits, but for questions, each of which has its own.
        bit = int(bits[32 + k % 32]) if state == ASKED else int(bits[k % 5])
        buffers.bit[slot, k], buffers.mode[slot, k], buffers.state[slot, k] = bit, mode, state
        buffers.condition[slot, k] = int(bits[5 + k % 20]) if state == LATCH and k % 2 else bit
        if state == ASKED:
            buffers.row[slot, k] = -1
    if n > 3:
        # A row that only conditions read.
        numbers = (buffers.bit, buffers.row, buffers.condition)
        for part, value in zip(numbers, (-1, -1, -1), strict=True):
            part[slot, n // 2] = value
        buffers.mode[slot, n // 2], buffers.state[slot, n // 2] = OBSERVE, PLAIN
    ceiling, base = z_bounds(buffers.params[slot, :n])
    norm = buffers.encoder[slot, :n].square().sum(dim=1)
    buffers.params[slot, :n, CEILING], buffers.params[slot, :n, BASE] = ceiling, base
    buffers.params[slot, :n, NORM] = norm
    buffers.stateful[slot] = bool((buffers.state[slot, :n] != PLAIN).any())
    buffers.held[slot] = bool((buffers.mode[slot, :n] == HOLD).any())


def _fill_gates(buffers: PointBuffers, slot: int, n: int, generator: torch.Generator) -> None:
    buffers.above[slot, :n, :n], buffers.below[slot, :n, :n] = -INF, INF
    for k in range(n):
        kind = int(torch.randint(4, (), generator=generator))
        if kind == 1:
            buffers.above[slot, k, (k + 1) % n] = -0.5
            buffers.below[slot, k, (k + 2) % n] = 1.0
        if kind == 2:
            buffers.above[slot, k, k] = 0.0
        buffers.gated[slot, k] = kind in (1, 2)


def random_step(
    buffers: PointBuffers, tokens: int, dtype: torch.dtype, *, two_parts: bool, seed: int
) -> Step:
    """Tokens of several requests, each in its slot; one without a table, others with notes already."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    slots, rows, width = len(buffers.count), buffers.bit.shape[1], buffers.encoder.shape[2]
    stream = (torch.randn(tokens, width, generator=generator) * 2).to(dtype)
    addend = torch.randn(tokens, width, generator=generator).to(dtype) if two_parts else None
    owner = draw(0, 5, tokens).sort().values
    slot_of, table_of = draw(-1, slots, 5).int(), torch.randperm(8, generator=generator)[:5].int()
    table_of[int(draw(0, 5))] = -1
    since = torch.full((8, 128), NEVER)
    earlier = torch.rand(8, 128, generator=generator) < 0.2
    since[earlier] = draw(0, 12, 8, 128)[earlier]
    first = draw(0, 9, 5)
    position = first[owner] + torch.arange(tokens) - torch.searchsorted(owner, owner)
    mask = draw(-(2**63), 2**63 - 1, tokens) | draw(-(2**63), 2**63 - 1, tokens)
    return Step(
        stream,
        addend,
        slot_of[owner],
        mask,
        History(table_of[owner], position, since),
        torch.full((tokens, rows, 2), 7.0),
    )


def by_reference(buffers: PointBuffers, step: Step) -> Step:
    """The three stages in plain torch."""
    s = step.copy()
    note_reference(s.stream, s.addend, buffers, s.slot, s.rows, s.history)
    steer_reference(s.stream, s.addend, buffers, s.slot, s.rows, s.trace, s.history)
    hold_reference(s.stream, s.addend, buffers, s.slot, s.trace, s.history)
    return s


def by_cpu(buffers: PointBuffers, step: Step) -> Step:
    """The compiled loops, which see the steered tokens alone."""
    s = step.copy()
    at = torch.nonzero(s.slot >= 0)[:, 0]
    slot, rows, trace = s.slot[at], s.rows[at], s.trace[at]
    history = History(s.history.table[at], s.history.position[at], s.history.since)
    note_cpu(s.stream, s.addend, buffers, at, slot, rows, history)
    steer_cpu(s.stream, s.addend, buffers, at, slot, rows, trace, history)
    hold_cpu(s.stream, s.addend, buffers, at, slot, trace, history)
    s.rows[at] = rows
    s.trace.fill_(torch.nan)
    s.trace[at] = trace
    return s


def by_triton(buffers: PointBuffers, step: Step) -> Step:
    """The GPU's kernels, interpreted; traces of tokens without rows are not theirs to write."""
    s = step.copy()
    # On a device, what does not fit a number is infinite without a word.
    with interpreted() as kernels, np.errstate(over="ignore", invalid="ignore"):
        kernels.note_triton(s.stream, s.addend, buffers, s.slot, s.rows, s.history)
        kernels.steer_triton(s.stream, s.addend, buffers, s.slot, s.rows, s.trace, s.history)
        kernels.hold_triton(s.stream, s.addend, buffers, s.slot, s.trace, s.history)
    s.trace[(s.slot < 0) | (buffers.count[s.slot.clamp(min=0)] == 0)] = torch.nan
    return s


EVERY_OP = [by_reference, by_cpu, pytest.param(by_triton, marks=pytest.mark.interpreted)]
