"""Steering in host memory: numba loops over the steered tokens, and nothing at all for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..catalog import Catalog
from ..steer.cpu import steer_cpu
from ..steer.dense import steer_dense
from ..tokens import Batch, TokenMap
from .base import Request, Runtime

__all__ = ["HostRuntime"]

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class _Step:
    """What a step steered, until its tokens can be counted."""

    ids: list[str]
    settled: Int64
    table_of: Int32
    count: int
    ends: Int32
    drafts: Int32 | None


class HostRuntime(Runtime):
    """The runtime of a CPU worker; see `Runtime` for the arguments."""

    def __init__(self, catalog: Catalog, points: Sequence[int], **sizes: Any) -> None:
        super().__init__(catalog, points, **sizes)
        self.tokens = TokenMap(sizes["max_tokens"], self.special)
        self._counted = {p: (b.count.numpy(), b.bit.numpy()) for p, b in self.buffers.items()}
        self._trace_view = {point: trace.numpy() for point, trace in self._trace.items()}
        self._settled: Int64 = np.empty(0, dtype=np.int64)
        self._table_of: Int32 = np.empty(0, dtype=np.int32)
        self._layout: Batch | None = None
        self._pending: _Step | None = None

    @property
    def is_active(self) -> bool:
        """Whether a step has anything to do: some request is steered, or its last step awaits counting."""
        return bool(self._requests) or self._pending is not None

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
            self._pending = _Step(self._batch_ids or [], self._settled, self._table_of, count, ends, drafts)

    def end_step(self) -> None:
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
        n = self.tokens.count
        if n == 0:
            return
        tokens, buffers, trace = self.tokens, self.buffers[point], self._trace[point]
        index, slot, rows = tokens.index[:n], tokens.slot[:n], tokens.rows[:n]
        if buffers.dense_slots:
            whole = buffers.dense[slot.long()]
            if whole.any():
                at = torch.nonzero(whole)[:, 0]
                own = trace[at]
                steer_dense(stream, addend, buffers, index[at], slot[at], rows[at], own, self.residents)
                slot = torch.where(whole, -1, slot)
                steer_cpu(stream, addend, buffers, index, slot, rows, trace)
                trace[at] = own
                return
        steer_cpu(stream, addend, buffers, index, slot, rows, trace)

    def _lay_out(self, batch: list[Request | None]) -> None:
        for request, settled in zip(self._batch, self._settled.tolist(), strict=True):
            if request is not None:
                request.settled = settled
        self._settled = np.array([0 if r is None else r.settled for r in batch], dtype=np.int64)
        self._table_of = np.array([-1 if r is None else r.table for r in batch], dtype=np.int32)
        self._layout = None
        if any(request is not None for request in batch):
            slots = [-1 if request is None else request.slot for request in batch]
            self._layout = Batch.of(slots, [None if r is None else r.selector for r in batch])
