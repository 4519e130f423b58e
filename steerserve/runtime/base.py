"""What both runtimes share: which requests are steered, by which plan, in which slot, with which report.

A model runner drives it, once a step: `remove` and `add` for the requests that ended and arrived,
`begin_step`, the forward pass that calls `steer` at each hook point, `end_step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..catalog import Catalog
from ..plan import Plan
from ..sae import Sae
from ..sae.resident import Resident
from ..slots import SlotTable
from ..steer.buffers import PointBuffers
from ..steer.history import NEVER
from ..tally import MAX_ROWS, Tallies, Tally, on_host
from ..window import Selector

__all__ = ["Request", "Runtime"]


@dataclass
class Request:
    """One steered engine request. Tokens below `settled` are in its tally already (host runtime).

    `is_counted` says that its report was taken when its end was known: what is computed of it since counts
    no more.
    """

    name: str
    plan: Plan
    selector: Selector
    ticket: str
    table: int
    from_cache: NDArray[np.int64]
    slot: int = -1
    settled: int = 0
    is_counted: bool = False


class Runtime(ABC):
    """All steering state of one worker.

    Args:
        catalog: what is served.
        points: the hook points whose layers this worker holds (all of them without pipeline parallelism).
        max_requests: the most requests in one step; as many slots exist, so that none ever waits for one.
        max_tokens: the most tokens in one step.
        vocab: size of the token table.
        device: where the residual stream lives.
    """

    def __init__(
        self,
        catalog: Catalog,
        points: Sequence[int],
        *,
        max_requests: int,
        max_tokens: int,
        vocab: int,
        device: torch.device | str = "cpu",
    ) -> None:
        rows = catalog.rows_per_point
        self.catalog = catalog
        self.device = torch.device(device)
        self.slots = SlotTable(max_requests)
        self.residents = [
            Resident.of(source.body, device) if source.point.index in points else None
            for source in catalog.residents
            if isinstance(source.body, Sae)
        ]
        self.buffers = {p: PointBuffers(max_requests, rows, catalog.d_model, device) for p in points}
        self.tallies = Tallies(max_requests, device)
        self.special = np.zeros(vocab, dtype=np.bool_)
        self.special[[token for token in catalog.special_tokens if token < vocab]] = True
        self._trace = {p: torch.empty(max_tokens, rows, 2, device=device) for p in points}
        self._since = self.tallies.since
        self._requests: dict[str, Request] = {}
        self._plans: dict[str, Plan] = {}
        self._batch_ids: list[str] | None = None
        self._batch: list[Request | None] = []
        self._may_abort = False

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes: slots, traces and resident SAEs."""
        traces = sum(trace.nbytes for trace in self._trace.values())
        residents = sum(resident.nbytes for resident in self.residents if resident is not None)
        return traces + residents + sum(buffers.nbytes for buffers in self.buffers.values())

    def add(
        self, request_id: str, wire: Sequence[Any], prompt: NDArray[np.int64], ticket: str, computed: int
    ) -> None:
        """A steered request is scheduled for the first time, or again after it was preempted.

        Args:
            wire: its plan, as made by `Plan.wire`.
            prompt: [n] its prompt's token ids.
            ticket: names its report; "" if none is wanted.
            computed: tokens of the prompt that came from the prefix cache.
        """
        self._leave_batch()
        if request_id in self._requests:
            return
        plan = self._plans.get(wire[0]) or Plan.from_wire(wire)
        self._plans[plan.digest] = plan
        selector = plan.selector(len(prompt))
        masks = selector.masks(0, prompt[:computed], self.special)
        bits = np.array(plan.bits.row, dtype=np.int64)
        from_cache = ((masks[:, None] >> bits) & 1).sum(axis=0)
        table = self.tallies.open(computed)
        self._requests[request_id] = Request(
            request_id, plan, selector, ticket, table, from_cache, settled=computed
        )

    def remove(self, request_id: str) -> None:
        """A request has ended, however it did."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        self.settle()
        self._let_go(request)
        tally = None if request.is_counted else self._tally(request)
        self.tallies.close(request.table, tally, request.ticket)
        self._leave_batch()
        self._forget_unused_plans()

    @abstractmethod
    def settle(self) -> None:
        """Count the last step's tokens, as far as it is known which of them stand; each one once."""

    @abstractmethod
    def steer(self, point: int, stream: Tensor, addend: Tensor | None) -> None:
        """The op at one hook point, on the step's tokens; in place (see `steer_reference`)."""

    @abstractmethod
    def end_step(self) -> None:
        """The forward pass is over: whatever runs the model next (a warm-up, an idle step) is not steered."""

    def collect(self, tickets: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        """Reports of the named tickets, finished or still running, and totals since the start.

        Args: tickets: of each its requests' ends, as far as they are known: the position below which a
            request counts, whatever was computed behind it.
        """
        self.settle()
        taken = {ticket: self.tallies.take(ticket) for ticket in tickets}
        running = [request for request in self._requests.values() if request.ticket in tickets]
        for request in running:
            taken[request.ticket].append(self._tally(request))
        arrived = iter(on_host([tally for found in taken.values() for tally in found]))
        tallies = {
            ticket: [next(arrived).until(tickets[ticket].get(tally.request_id, NEVER)) for tally in found]
            for ticket, found in taken.items()
        }
        self._add_to_totals(tallies, running, tickets)
        return {
            "tallies": {ticket: [t.wire for t in found] for ticket, found in tallies.items()},
            "requests": {ticket: len(found) for ticket, found in tallies.items()},
            "inexact": [t for t, found in tallies.items() if not all(tally.is_exact for tally in found)],
            "tokens": self.tallies.totals(),
            "slots": {"in_use": self.slots.in_use, "capacity": self.slots.capacity},
        }

    def _add_to_totals(
        self,
        tallies: Mapping[str, Sequence[Tally]],
        running: Sequence[Request],
        tickets: Mapping[str, Mapping[str, int]],
    ) -> None:
        """Of requests that run on only those whose end is known; the others once they have ended."""
        going_on = set()
        for request in running:
            request.is_counted = request.name in tickets[request.ticket]
            request.ticket = ""
            if not request.is_counted:
                going_on.add(request.name)
        self.tallies.add(t for found in tallies.values() for t in found if t.request_id not in going_on)

    @property
    def may_abort(self) -> bool:
        """Whether any request of the step's batch could end in it."""
        return self._may_abort

    def aborts(self) -> dict[str, int]:
        """Where requests of the last step's batch end: the first position at which a condition held that ends
        them, or at which a row of a policy could not be held. Drafts count, whether they stand or not."""
        return self.aborts_of(self.notes().cpu()) if self._may_abort else {}

    def notes(self) -> Tensor:
        """[R, 128] what is noted of the batch's requests, on the device; nothing waits for it.

        Rows of requests that are not steered are any.
        """
        return self._since.index_select(0, self._batch_tables.clamp(min=0))

    @property
    @abstractmethod
    def _batch_tables(self) -> Tensor:
        """[R] int32 on the device: each request's number in the tallies, −1 for none; of a steered batch."""

    def aborts_of(self, notes: Tensor) -> dict[str, int]:
        """As `aborts`, of notes that have reached the host."""
        found: dict[str, int] = {}
        if int(notes.min()) >= NEVER:
            return found
        ids = self._batch_ids or []
        for request_id, request, row in zip(ids, self._batch, notes.numpy(), strict=True):
            ends = row[request.plan.ending] if request is not None else row[:0]
            if len(ends) and (first := int(ends.min())) < NEVER:
                found[request_id] = first
        return found

    @abstractmethod
    def _lay_out(self, batch: list[Request | None]) -> None:
        """The batch has changed: prepare what every step of it needs."""

    @staticmethod
    def _ending(batch: Sequence[Request | None]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Which requests of a batch a row may end, and [n, 128] which of their rows."""
        found = {i: r.plan.ending for i, r in enumerate(batch) if r is not None and r.plan.may_abort}
        rows = np.zeros((len(found), MAX_ROWS), dtype=np.bool_)
        for line, ending in zip(rows, found.values(), strict=True):
            line[ending] = True
        return np.array([*found], dtype=np.int64), rows

    def _tally(self, request: Request) -> Tally:
        return self.tallies.read(request.table, request.name, request.plan, request.from_cache)

    def _leave_batch(self) -> None:
        """The next step's batch is another one; until it begins, no request of the last one can end."""
        self._batch_ids = None
        self._may_abort = False

    def _enter(self, request_ids: Sequence[str]) -> None:
        """Give the steered requests of a batch their slots, and take those of the others."""
        # Whatever fails below, the next step must not take the layout of the one before it.
        self._leave_batch()
        batch = [self._requests.get(request_id) for request_id in request_ids]
        present = {id(request) for request in batch if request is not None}
        for request in self._requests.values():
            if request.slot >= 0 and id(request) not in present:
                self._let_go(request)
        for entering in batch:
            if entering is not None and entering.slot < 0:
                self._take_slot(entering)
        self._lay_out(batch)
        self._may_abort = any(request is not None and request.plan.may_abort for request in batch)
        self._batch, self._batch_ids = batch, list(request_ids)

    def _take_slot(self, request: Request) -> None:
        slot, fresh = self.slots.acquire(request.plan.digest)
        if fresh:
            try:
                for point, buffers in self.buffers.items():
                    buffers.write(slot, request.plan, point, self.catalog)
            except BaseException:
                self.slots.forget(request.plan.digest)
                raise
        request.slot = slot

    def _let_go(self, request: Request) -> None:
        if request.slot >= 0:
            self.slots.release(request.plan.digest)
            request.slot = -1

    def _forget_unused_plans(self) -> None:
        if len(self._plans) > 4 * self.slots.capacity:
            used = {request.plan.digest for request in self._requests.values()}
            self._plans = {digest: plan for digest, plan in self._plans.items() if digest in used}
