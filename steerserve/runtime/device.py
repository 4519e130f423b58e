"""Steering on an accelerator: where a step's tokens stand is read from the model runner's own device tensors.

Nothing is copied back and nothing waits: with asynchronous scheduling the host does not know which tokens a
step holds, nor how many drafts were accepted. Under CUDA graphs `steer` is recorded once; the fixed buffers
change between replays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..catalog import Catalog
from ..steer.crossing import sent
from ..steer.dense import steer_dense
from ..steer.history import NEVER, History
from ..steer.triton import (
    DeviceBatch,
    count_triton,
    fill_triton,
    hold_triton,
    note_triton,
    steer_triton,
)
from ..tokens import Batch
from .base import Request, Runtime

__all__ = ["DeviceRuntime"]


class DeviceRuntime(Runtime):
    """The runtime of an accelerator's worker; see `Runtime` for the arguments."""

    def __init__(self, catalog: Catalog, points: Sequence[int], **sizes: Any) -> None:
        super().__init__(catalog, points, **sizes)

        def full(value: int, dtype: torch.dtype) -> Tensor:
            return torch.full((sizes["max_tokens"],), value, dtype=dtype, device=self.device)

        self._slot = full(-1, torch.int32)
        self._rows = full(0, torch.int64)
        self._table = full(-1, torch.int32)
        self._position = full(0, torch.int64)
        self._special = torch.from_numpy(self.special).to(self.device)
        self._layout: DeviceBatch | None = None
        self._ends: Tensor | None = None
        self._ending_rows: tuple[Tensor, Tensor] | None = None
        self._marked = False
        self._uncounted = False
        self._dense = False

    def begin_step(
        self, request_ids: Sequence[str], starts: Tensor, positions: Tensor, token_ids: Tensor
    ) -> None:
        """Point every token of the coming step at its rows.

        Args:
            request_ids: the batch, in token order.
            starts: [≥ R + 1] int32, where each request's tokens begin.
            positions: [≥ T] int64, each token's position in its request.
            token_ids: [≥ T] int32.
        Raises: CheckpointError if a plan's weights can no longer be read.
        """
        self.settle()
        if list(request_ids) != self._batch_ids:
            self._enter(request_ids)
        if self._layout is None:
            self.end_step()
            return
        self._map(self._layout, starts, positions, token_ids)
        n = len(self._batch)
        self._ends = positions[(starts[1 : n + 1] - 1).long()] + 1
        self._marked = self._uncounted = True

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile every kernel for the arguments that it will have; no request is to wait for that.

        Args: dtype: of the residual stream.
        """
        layout = DeviceBatch.of(Batch.of([-1], [None]), [-1], self.device)
        starts, ids = (torch.zeros(n, dtype=torch.int32, device=self.device) for n in (2, 1))
        positions = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._map(layout, starts, positions, ids)
        self._count(self.tallies.limits(layout.table, positions))
        stream = torch.zeros(1, self.catalog.d_model, dtype=dtype, device=self.device)
        for point in self.buffers:
            for addend in (None, torch.zeros_like(stream)):
                self._launch(point, stream, addend)

    def end_step(self) -> None:
        if self._marked:
            # What was steered is still to be counted: the map of a step is wiped only once that is done.
            self.settle()
            self._slot.fill_(-1)
            self._marked = False

    def settle(self, computed_now: Tensor | None = None) -> None:
        """Count the last step's tokens, unless they are counted already.

        Args: computed_now: [R] where each request of the batch stands after the step, which leaves out the
            drafts that were rejected; None if all of its tokens stand.
        """
        if not self._uncounted or self._layout is None or self._ends is None:
            return
        self._uncounted = False
        limit = self._ends
        if computed_now is not None:
            limit = torch.minimum(limit, computed_now.to(limit.dtype))
        limits = self.tallies.limits(self._layout.table, limit)
        self._count(self._up_to_the_end(limits))
        self.tallies.settle(limits)

    def _map(self, layout: DeviceBatch, starts: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        fill_triton(
            layout,
            starts,
            positions,
            token_ids,
            self._special,
            self._slot,
            self._rows,
            self._table,
            self._position,
            self._since,
        )

    def _count(self, limits: Tensor) -> None:
        for point, buffers in self.buffers.items():
            count_triton(
                self.tallies.table,
                self.tallies.recent,
                self._slot,
                self._table,
                self._position,
                self.tallies.settled,
                limits,
                buffers,
                self._trace[point],
            )

    def _up_to_the_end(self, limits: Tensor) -> Tensor:
        """No position counts behind the one at which a row ends its request, wherever the step cut it."""
        if self._ending_rows is None:
            return limits
        tables, rows = self._ending_rows
        first = torch.where(rows, self._since[tables], NEVER).amin(dim=1)
        return limits.index_copy(0, tables, torch.minimum(limits[tables], first + 1))

    def steer(self, point: int, stream: Tensor, addend: Tensor | None) -> None:
        if not self._marked and not stream.is_cuda:
            return
        # On a GPU also where nothing is steered: a graph that is recorded then is replayed for other steps.
        self._launch(point, stream, addend)

    def _launch(self, point: int, stream: Tensor, addend: Tensor | None) -> None:
        tokens = stream.shape[0]
        buffers, trace = self.buffers[point], self._trace[point]
        slot, rows = self._slot[:tokens], self._rows[:tokens]
        history = History(self._table[:tokens], self._position[:tokens], self._since)
        formula, dense = slot, None
        if self._dense and buffers.dense_slots:
            whole = (slot >= 0) & buffers.dense[slot.long().clamp(min=0)]
            dense, formula = torch.nonzero(whole)[:, 0], torch.where(whole, -1, slot)
        note_triton(stream, addend, buffers, formula, rows, history)
        own = None if dense is None else self._steer_dense(point, stream, addend, dense, history)
        steer_triton(stream, addend, buffers, formula, rows, trace, history)
        if dense is not None and own is not None:
            trace[dense] = own
        hold_triton(stream, addend, buffers, slot, trace, history)

    def _steer_dense(
        self, point: int, stream: Tensor, addend: Tensor | None, at: Tensor, history: History
    ) -> Tensor:
        """Steer the tokens `at`, which need a whole SAE. Returns: their trace."""
        trace, rows = self._trace[point][at], self._rows[at]
        notes = History(history.table[at], history.position[at], history.since)
        places = (at, self._slot[at], rows)
        steer_dense(stream, addend, self.buffers[point], *places, trace, self.residents, notes)
        self._rows[at] = rows
        return trace

    @property
    def _batch_tables(self) -> Tensor:
        assert self._layout is not None
        return self._layout.table

    def _lay_out(self, batch: list[Request | None]) -> None:
        self._layout = None
        if any(request is not None for request in batch):
            slots = [-1 if r is None else r.slot for r in batch]
            tables = [-1 if r is None else r.table for r in batch]
            selectors = [None if r is None else r.selector for r in batch]
            self._ending_rows = self._ending_on_device(batch)
            self._layout = DeviceBatch.of(Batch.of(slots, selectors), tables, self.device)
            self._dense = any(slot in b.dense_slots for slot in slots for b in self.buffers.values())

    def _ending_on_device(self, batch: list[Request | None]) -> tuple[Tensor, Tensor] | None:
        """As `_ending`, by table; None where no row ends anything."""
        requests, rows = self._ending(batch)
        if not len(requests):
            return None
        tables = np.array([-1 if r is None else r.table for r in batch], dtype=np.int64)[requests]
        there = sent({"tables": tables, "rows": rows}, self.device)
        return there["tables"], there["rows"]
