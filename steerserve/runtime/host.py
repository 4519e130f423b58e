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
from ..errors import IncompatibleError
from ..steer.cpu import hold_cpu, note_cpu, steer_cpu
from ..steer.dense import steer_dense
from ..steer.history import NEVER, History
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
    ending: tuple[Int64, NDArray[np.bool_]]


class HostRuntime(Runtime):
    """The runtime of a CPU worker; see `Runtime` for the arguments."""

    def __init__(self, catalog: Catalog, points: Sequence[int], **sizes: Any) -> None:
        super().__init__(catalog, points, **sizes)
        if self.device.type != "cpu":
            raise IncompatibleError(f"expected a stream in host memory, got one on {self.device}")
        self.tokens = TokenMap(sizes["max_tokens"], self.special)
        self._counted = {p: (b.count.numpy(), b.row.numpy()) for p, b in self.buffers.items()}
        self._token_table = torch.zeros(sizes["max_tokens"], dtype=torch.int32)
        self._token_position = torch.from_numpy(self.tokens.position)
        self._noted: Int64 = np.empty(0, dtype=np.int64)
        self._trace_view = {point: trace.numpy() for point, trace in self._trace.items()}
        self._settled: Int64 = np.empty(0, dtype=np.int64)
        self._table_of: Int32 = np.empty(0, dtype=np.int32)
        self._layout: Batch | None = None
        self._ending_rows = self._ending([])
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
        self._take_back(computed, scheduled)
        if count:
            self._token_table.numpy()[:count] = self._table_of[self.tokens.owner[:count]]
            ends = computed + scheduled
            place = (self._settled, self._table_of, count, ends, drafts, self._ending_rows)
            self._pending = _Step(self._batch_ids or [], *place)

    def _take_back(self, computed: Int32, scheduled: Int32) -> None:
        """Forget what was noted at positions that are computed again.

        What was noted behind them stays: a request may be preempted before it gets there, and come back
        with those positions read from the cache.
        """
        if len(self._noted):
            tables, since = self._table_of[self._noted], self._since.numpy()
            begin = computed[self._noted][:, None]
            notes, end = since[tables], begin + scheduled[self._noted][:, None]
            since[tables] = np.where((notes >= begin) & (notes < end), NEVER, notes)

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
        counted = self._up_to_the_end(step, limits)
        n, tokens = step.count, self.tokens
        for point, (rows, bit) in self._counted.items():
            self.tallies.count(
                step.table_of,
                tokens.owner[:n],
                tokens.position[:n],
                step.settled,
                counted,
                tokens.slot_view,
                rows,
                bit,
                self._trace_view[point],
            )
        step.settled[:] = limits
        if step.drafts is None:
            self._pending = None

    def accept(self, accepted: Mapping[str, int]) -> None:
        """The last step has sampled, which tells how many of its drafts stand.

        Args: accepted: by request; of one that is not named, none.
        """
        step = self._pending
        if step is not None and step.drafts is not None:
            certain = (step.ends - step.drafts).tolist()
            self.settle({name: c + accepted.get(name, 0) for name, c in zip(step.ids, certain, strict=True)})

    def _up_to_the_end(self, step: _Step, limits: Int64) -> Int64:
        """No position counts behind the one at which a row ends its request, wherever the step cut it."""
        requests, rows = step.ending
        if not len(requests):
            return limits
        first = np.where(rows, self._since.numpy()[step.table_of[requests]], NEVER).min(axis=1)
        counted = limits.copy()
        counted[requests] = np.minimum(limits[requests], first + 1)
        return counted

    def steer(self, point: int, stream: Tensor, addend: Tensor | None) -> None:
        n = self.tokens.count
        if n == 0:
            return
        tokens, buffers, trace = self.tokens, self.buffers[point], self._trace[point]
        index, slot, rows = tokens.index[:n], tokens.slot[:n], tokens.rows[:n]
        history = History(self._token_table[:n], self._token_position[:n], self._since)
        formula, dense = slot, None
        if buffers.dense_slots:
            whole = buffers.dense[slot.long()]
            if whole.any():
                dense = torch.nonzero(whole)[:, 0]
                formula = torch.where(whole, -1, slot)
        if buffers.stateful_slots:
            note_cpu(stream, addend, buffers, index, formula, rows, history)
        if dense is None:
            steer_cpu(stream, addend, buffers, index, slot, rows, trace, history)
        else:
            own = self._steer_dense(point, stream, addend, dense, history)
            steer_cpu(stream, addend, buffers, index, formula, rows, trace, history)
            trace[dense] = own
        if buffers.held_slots:
            hold_cpu(stream, addend, buffers, index, slot, trace, history)

    def _steer_dense(
        self, point: int, stream: Tensor, addend: Tensor | None, at: Tensor, history: History
    ) -> Tensor:
        """Steer the mapped tokens `at`, which need a whole SAE. Returns: their trace."""
        tokens = self.tokens
        trace, rows = self._trace[point][at], tokens.rows[at]
        notes = History(history.table[at], history.position[at], history.since)
        places = (tokens.index[at], tokens.slot[at], rows)
        steer_dense(stream, addend, self.buffers[point], *places, trace, self.residents, notes)
        tokens.rows[at] = rows
        return trace

    @property
    def _batch_tables(self) -> Tensor:
        return torch.from_numpy(self._table_of)

    def _lay_out(self, batch: list[Request | None]) -> None:
        for request, settled in zip(self._batch, self._settled.tolist(), strict=True):
            if request is not None:
                request.settled = settled
        self._settled = np.array([0 if r is None else r.settled for r in batch], dtype=np.int64)
        self._table_of = np.array([-1 if r is None else r.table for r in batch], dtype=np.int32)
        self._ending_rows = self._ending(batch)
        noted = [i for i, r in enumerate(batch) if r is not None and r.plan.notes]
        self._noted = np.array(noted, dtype=np.int64)
        self._layout = None
        if any(request is not None for request in batch):
            slots = [-1 if request is None else request.slot for request in batch]
            self._layout = Batch.of(slots, [None if r is None else r.selector for r in batch])
