"""Steering inside a worker: from the requests of a step to what the op at the layer reads.

Knows nothing of vLLM. A model runner drives it, once a step: `settle`, `remove` and `add` for the requests
that ended and arrived, `begin_step`, the forward pass that calls `steer` at each hook point, `end_step`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .catalog import Catalog
from .plan import Plan
from .slots import SlotTable
from .steer import PointBuffers, steer_cpu
from .tally import Tallies, Tally
from .tokens import Batch, TokenMap
from .window import Selector

__all__ = ["Runtime"]

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass
class _Request:
    """One steered engine request. Tokens below `settled` are in its tally already."""

    plan: Plan
    selector: Selector
    ticket: str
    table: int
    from_cache: NDArray[np.int64]
    slot: int = -1
    settled: int = 0


@dataclass(frozen=True)
class _Step:
    """What a step steered, until its tokens can be counted."""

    ids: list[str]
    settled: Int64
    table_of: Int32
    count: int
    ends: Int32
    drafts: Int32 | None


class Runtime:
    """All steering state of one worker.

    Args:
        catalog: what is served.
        points: the hook points whose layers this worker holds (all of them without pipeline parallelism).
        max_requests: the most requests in one step; as many slots exist, so that none ever waits for one.
        max_tokens: the most tokens in one step.
        vocab: size of the token table.
    """

    def __init__(
        self, catalog: Catalog, points: Sequence[int], *, max_requests: int, max_tokens: int, vocab: int
    ) -> None:
        rows = catalog.rows_per_point
        self.catalog = catalog
        self.slots = SlotTable(max_requests)
        self.buffers = {point: PointBuffers(max_requests, rows, catalog.d_model) for point in points}
        self.tokens = TokenMap(max_tokens, vocab, catalog.special_tokens)
        self.tallies = Tallies(max_requests)
        self._counted = {p: (b.count.numpy(), b.bit.numpy()) for p, b in self.buffers.items()}
        self._trace = {point: torch.empty(max_tokens, rows, 2) for point in points}
        self._trace_view = {point: trace.numpy() for point, trace in self._trace.items()}
        self._settled = np.empty(0, dtype=np.int64)
        self._requests: dict[str, _Request] = {}
        self._plans: dict[str, Plan] = {}
        self._batch_ids: list[str] = []
        self._batch: list[_Request | None] = []
        self._table_of: Int32 = np.empty(0, dtype=np.int32)
        self._layout: Batch | None = None
        self._pending: _Step | None = None

    @property
    def is_active(self) -> bool:
        """Whether a step has anything to do: some request is steered, or its last step awaits counting."""
        return bool(self._requests) or self._pending is not None

    def add(
        self, request_id: str, wire: Sequence[Any], prompt: NDArray[np.int64], ticket: str, computed: int
    ) -> None:
        """A steered request is scheduled for the first time.

        Args:
            wire: its plan, as made by `Plan.wire`.
            prompt: [n] its prompt's token ids.
            ticket: names its report; "" if none is wanted.
            computed: tokens of the prompt that came from the prefix cache.
        """
        plan = self._plans.get(wire[0]) or Plan.from_wire(wire)
        self._plans[plan.digest] = plan
        selector = plan.selector(len(prompt))
        masks = selector.masks(0, prompt[:computed], self.tokens.special)
        bits = np.arange(len(plan.rows))
        from_cache = ((masks[:, None] >> bits) & 1).sum(axis=0)
        table = self.tallies.open()
        self._requests[request_id] = _Request(plan, selector, ticket, table, from_cache, settled=computed)
        self._batch_ids = []

    def remove(self, request_id: str) -> None:
        """A request has ended, however it did."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        self.settle()
        self._let_go(request)
        self.tallies.close(request.table, self._tally(request), request.ticket)
        self._batch_ids = []
        self._forget_unused_plans()

    def begin_step(
        self,
        request_ids: list[str],
        scheduled: Int32,
        computed: Int32,
        token_ids: Int32,
        drafts: Int32 | None = None,
    ) -> None:
        """Point every token of the coming step at its rows.

        Args:
            request_ids: the batch, in token order.
            scheduled: [R] tokens of each in this step.
            computed: [R] tokens of each before it.
            token_ids: [≥ sum of scheduled] ids.
            drafts: [R] how many of the scheduled tokens, the last ones, are speculative.
        Raises: CheckpointError if a plan's weights can no longer be read.
        """
        self.settle()
        self._pending = None
        if request_ids != self._batch_ids:
            self._enter(request_ids)
        if self._layout is None:
            return
        count = self.tokens.fill(self._layout, scheduled, computed, token_ids)
        if count:
            ends = computed + scheduled
            self._pending = _Step(self._batch_ids, self._settled, self._table_of, count, ends, drafts)

    def end_step(self) -> None:
        """The forward pass is over: whatever runs the model next (a warm-up, an idle step) is not steered."""
        self.tokens.clear()

    def settle(self, computed_now: Mapping[str, int] | None = None) -> None:
        """Count the last step's tokens that are now known to stand; each one once.

        Args:
            computed_now: where requests that go on stand by now, which tells how many of their drafts were
                accepted. Drafts of other requests stay uncounted until it is known.
        """
        step = self._pending
        if step is None:
            return
        ends = step.ends.astype(np.int64)
        limits = ends if step.drafts is None else ends - step.drafts
        if computed_now:
            known = np.array([computed_now.get(request_id, -1) for request_id in step.ids], dtype=np.int64)
            limits = np.where(known < 0, limits, np.minimum(known, ends))
        limits = np.maximum(step.settled, limits)
        n, tokens = step.count, self.tokens
        for point, (rows, bit) in self._counted.items():
            self.tallies.count(
                step.table_of,
                tokens.owner[:n],
                tokens.position[:n],
                step.settled,
                limits,
                tokens.slot_view,
                rows,
                bit,
                self._trace_view[point],
            )
        step.settled[:] = limits
        if step.drafts is None:
            self._pending = None

    def steer(self, point: int, stream: Tensor, addend: Tensor | None) -> None:
        """The op at one hook point, on the step's tokens; in place (see `steer_reference`)."""
        n = self.tokens.count
        if n == 0:
            return
        tokens = self.tokens
        steer_cpu(
            stream,
            addend,
            self.buffers[point],
            tokens.index[:n],
            tokens.slot[:n],
            tokens.rows[:n],
            self._trace[point],
        )

    def collect(self, tickets: Sequence[str]) -> dict[str, Any]:
        """Reports of the named tickets, finished or still running, and totals since the start."""
        self.settle()
        live = {id(r): self._tally(r) for r in self._requests.values()}
        tallies = {ticket: self.tallies.take(ticket) for ticket in tickets}
        for request in self._requests.values():
            if request.ticket in tallies:
                tallies[request.ticket].append(live[id(request)])
                request.ticket = ""
        return {
            "tallies": {ticket: [row for t in found for row in t.wire] for ticket, found in tallies.items()},
            "requests": {ticket: len(found) for ticket, found in tallies.items()},
            "tokens": self.tallies.totals(live.values()),
            "slots": {"in_use": self.slots.in_use, "capacity": self.slots.capacity},
        }

    def _tally(self, request: _Request) -> Tally:
        return self.tallies.read(request.table, request.plan, request.from_cache)

    def _enter(self, request_ids: list[str]) -> None:
        for request, settled in zip(self._batch, self._settled.tolist(), strict=True):
            if request is not None:
                request.settled = settled
        batch = [self._requests.get(request_id) for request_id in request_ids]
        present = {id(request) for request in batch if request is not None}
        for request in self._requests.values():
            if request.slot >= 0 and id(request) not in present:
                self._let_go(request)
        for entering in batch:
            if entering is not None and entering.slot < 0:
                self._take_slot(entering)
        self._batch, self._batch_ids = batch, list(request_ids)
        self._settled = np.array([0 if r is None else r.settled for r in batch], dtype=np.int64)
        self._table_of = np.array([-1 if r is None else r.table for r in batch], dtype=np.int32)
        self._layout = None
        if present:
            slots = [-1 if request is None else request.slot for request in batch]
            self._layout = Batch.of(slots, [None if r is None else r.selector for r in batch])

    def _take_slot(self, request: _Request) -> None:
        slot, fresh = self.slots.acquire(request.plan.digest)
        if fresh:
            try:
                for point, buffers in self.buffers.items():
                    buffers.write(slot, request.plan, point, self.catalog)
            except BaseException:
                self.slots.forget(request.plan.digest)
                raise
        request.slot = slot

    def _let_go(self, request: _Request) -> None:
        if request.slot >= 0:
            self.slots.release(request.plan.digest)
            request.slot = -1

    def _forget_unused_plans(self) -> None:
        if len(self._plans) > 4 * self.slots.capacity:
            used = {request.plan.digest for request in self._requests.values()}
            self._plans = {digest: plan for digest, plan in self._plans.items() if digest in used}
