"""What steering did to each request, row by row: the evidence behind the report."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .plan import Plan
from .recent import WINDOW, Recent
from .steer.crossing import arriving
from .steer.history import NEVER

__all__ = ["Tallies", "Tally", "on_host"]

# Reports of finished requests that nobody came for (a client that left) are dropped oldest first.
MAX_FINISHED = 4096
# So many ended requests are sent to the host together, to be added up there.
MAX_ENDED = 1024
# Live requests for each that can run at once.
_MOST_LIVES = 16
# A request's own rows and those of policies.
MAX_ROWS = 128
COUNT, SUM_BEFORE, MAX_BEFORE, SUM_AFTER, MAX_AFTER, FIRED, LOWERED = range(7)
COLUMNS = LOWERED + 1


@dataclass(frozen=True)
class Tally:
    """One engine request's counts.

    table [rows, 7]: tokens, sum and maximum of f before, sum and maximum of f' after, tokens with f > 0 and
    with f' < f; without those of `recent`, if there is any. from_cache [rows]: tokens of the window that came
    steered from the prefix cache. since [rows]: where the row latched, ended the request, or could not be
    held; `NEVER` if it did not. is_exact: whether nothing behind the request's end is counted, as far as that
    is known.

    All of it lies where it was counted, until `on_host` brings it.
    """

    request_id: str
    plan: Plan
    table: Tensor
    from_cache: NDArray[np.int64]
    since: Tensor
    recent: Recent | None = None
    is_exact: bool = True

    def until(self, end: int) -> Tally:
        """The counts of the positions below `end` alone; of a tally in host memory."""
        if self.recent is None:
            return self
        table = self.table.clone()
        exact = self.recent.add_to(table.numpy(), end)
        since = torch.where(self.since < end, self.since, NEVER)
        return replace(self, table=table, since=since, recent=None, is_exact=exact)

    @property
    def tokens(self) -> Tensor:
        """[rows] how many tokens there are, the recent ones among them."""
        counts = self.table[:, COUNT]
        return counts if self.recent is None else counts + (self.recent.at >= 0).sum(-1)

    @property
    def wire(self) -> list[list[Any]]:
        """Per row of the plan, in order: from cache, since (−1 for never), and the table's columns."""
        rows = zip(self.from_cache.tolist(), self.since.tolist(), self.table.tolist(), strict=True)
        return [[cached, -1 if since == NEVER else since, *counts] for cached, since, counts in rows]


def on_host(tallies: Sequence[Tally]) -> list[Tally]:
    """The same tallies in host memory: four copies that are waited for, however many there are."""
    if not tallies:
        return []
    sizes = [len(tally.table) for tally in tallies]
    recents = [tally.recent for tally in tallies if tally.recent is not None]
    assert len(recents) == len(tallies)
    parts = (
        [tally.table for tally in tallies],
        [tally.since for tally in tallies],
        [recent.at for recent in recents],
        [recent.values for recent in recents],
    )
    arrived = zip(tallies, *(torch.cat(part).cpu().split(sizes) for part in parts), strict=True)
    return [replace(t, table=a, since=b, recent=Recent(c, d)) for t, a, b, c, d in arrived]


class Tallies:
    """One table of counts per live request, and the finished ones until their report is collected.

    table [M, 128, 7] float64, of all tokens but the last ones, which are in recent [M, 128]; settled [M]
    int64, the position up to which each request is counted (kept by the device runtime); since [≥ M, 128]
    int64, what is noted of it (see `History`). They lie on `device`; what is read there crosses to the host
    only for a report.
    """

    def __init__(self, capacity: int, device: torch.device | str = "cpu") -> None:
        with _changed_anywhere():
            self.table = torch.zeros(capacity, MAX_ROWS, COLUMNS, dtype=torch.float64, device=device)
            # Kernels recorded in a graph hold on to it, so that it must not grow.
            notes = (_MOST_LIVES * capacity, MAX_ROWS)
            self.since = torch.full(notes, NEVER, dtype=torch.int64, device=device)
            self.settled = torch.zeros(capacity, dtype=torch.int64, device=device)
            self.recent = Recent.blank(capacity, MAX_ROWS, device=device)
        self._free = list(range(capacity - 1, -1, -1))
        self._totals: Counter[tuple[str, str]] = Counter()
        self._ended: list[Tally] = []
        self._sent: list[Callable[[], Counter[tuple[str, str]]]] = []
        self._finished: OrderedDict[str, list[Tally]] = OrderedDict()

    def open(self, settled: int = 0) -> int:
        """A cleared table for a new request, of which the first `settled` tokens count no more.

        Returns: its number.
        """
        if not self._free:
            self._grow()
        number = self._free.pop()
        # A number assigned to an element of a tensor on a device is a copy that waits; filling it is none.
        self.table[number].zero_()
        self.table[number, :, MAX_BEFORE].fill_(-torch.inf)
        self.table[number, :, MAX_AFTER].fill_(-torch.inf)
        self.settled[number].fill_(settled)
        self.since[number].fill_(NEVER)
        self.recent.clear(number)
        return number

    def _grow(self) -> None:
        """Preempted requests keep their tables, so that more can live than run at once."""
        grown = len(self.table)
        if 2 * grown > len(self.since):
            raise RuntimeError(f"expected at most {len(self.since)} live requests")
        with _changed_anywhere():
            self.table = torch.cat([self.table, torch.zeros_like(self.table)])
            self.settled = torch.cat([self.settled, torch.zeros_like(self.settled)])
            self.recent = self.recent.grown()
        self._free = list(range(2 * grown - 1, grown - 1, -1))

    def read(self, number: int, request_id: str, plan: Plan, from_cache: NDArray[np.int64]) -> Tally:
        """The counts of a live request as they are now; nothing waits for them."""
        n = len(plan.rows)
        table, since = self.table[number, :n].clone(), self.since[number, :n].clone()
        return Tally(request_id, plan, table, from_cache, since, self.recent.of(number, n))

    def close(self, number: int, tally: Tally | None, ticket: str) -> None:
        """A request ended: keep its tally until its ticket is taken or, if it has none, add it to the totals.

        Args: tally: None where `add` was given it already.
        """
        self._free.append(number)
        if tally is None:
            return
        if not ticket:
            self._end([tally])
            return
        self._finished.setdefault(ticket, []).append(tally)
        if len(self._finished) > MAX_FINISHED:
            self._end(self._finished.popitem(last=False)[1])

    def take(self, ticket: str) -> list[Tally]:
        """The finished tallies of a ticket, which are forgotten; `add` what counts of them to the totals."""
        return self._finished.pop(ticket, [])

    def add(self, tallies: Iterable[Tally]) -> None:
        """Add what was read of requests to the totals. Args: tallies: in host memory."""
        for tally in tallies:
            self._totals.update(_tokens(_rows_of([tally]), tally.tokens))

    def totals(self) -> list[list[Any]]:
        """Tokens steered since the start: [source, op, tokens] each.

        A request counts once it has ended and its ticket was taken: until then it is not known which of its
        tokens anybody will receive, and what only grows cannot be put right.
        """
        self._send()
        self._add_up()
        return [[source, op, tokens] for (source, op), tokens in sorted(self._totals.items())]

    def count(
        self,
        table_of: NDArray[np.int32],
        owner: NDArray[np.int32],
        position: NDArray[np.int64],
        settled: NDArray[np.int64],
        limit: NDArray[np.int64],
        slot: NDArray[np.int32],
        rows: NDArray[np.int32],
        number: NDArray[np.int32],
        trace: NDArray[np.float32],
    ) -> None:
        """Count one step's trace at one hook point.

        Args:
            table_of: [R] table number of each request of the batch, −1 for none.
            owner: [n] each steered token's request.
            position: [n] each token's position in its request.
            settled, limit: [R] half-open range of positions that count now: not those computed again, nor
                rejected drafts.
            slot: [n] each token's slot.
            rows: [S] rows in use of each slot; number: [S, K] their numbers in the plan.
            trace: [≥ n, K, 2] f and f' where a row applied, NaN elsewhere.
        """
        at, values = self.recent.at.numpy(), self.recent.values.numpy()
        place = (table_of, owner, position, settled, limit, slot)
        _count(self.table.numpy(), at, values, *place, rows, number, trace)

    def limits(self, tables: Tensor, ends: Tensor) -> Tensor:
        """[M] int64 on the device: up to where each request counts now; 0 for those that are not named.

        Args: tables: [R] numbers, −1 for none. ends: [R] int64.
        """
        spare = torch.zeros(len(self.settled) + 1, dtype=torch.int64, device=self.settled.device)
        # Numbers of −1 fall on the last place, which is cut off.
        return spare.index_put_((tables.long(),), ends)[:-1]

    def settle(self, limits: Tensor) -> None:
        """Everything below these limits is counted. Args: limits: as `limits` returns them."""
        torch.maximum(self.settled, limits, out=self.settled)

    def _end(self, tallies: Iterable[Tally]) -> None:
        self._ended.extend(tallies)
        if len(self._ended) >= MAX_ENDED:
            # Those that were sent before have arrived since.
            self._add_up()
            self._send()

    def _send(self) -> None:
        """Start the counts of all ended requests on their way to the host, in one copy."""
        if self._ended:
            counts = torch.cat([tally.tokens for tally in self._ended])
            self._sent.append(arriving(counts, partial(_tokens, _rows_of(self._ended))))
            self._ended.clear()

    def _add_up(self) -> None:
        """Add what was sent to the totals; waits for what has not arrived."""
        for tokens in self._sent:
            self._totals.update(tokens())
        self._sent.clear()


def _changed_anywhere() -> AbstractContextManager[Any]:
    """Tensors made in inference mode may be changed only there; a report is asked for outside of it."""
    return torch.inference_mode(False)


def _rows_of(tallies: Iterable[Tally]) -> list[tuple[str, str]]:
    return [(row.source, row.op) for tally in tallies for row in tally.plan.rows]


def _tokens(rows: Sequence[tuple[str, str]], counts: Tensor) -> Counter[tuple[str, str]]:
    """Args: rows: source and op of each. counts: [rows], in host memory."""
    tokens: Counter[tuple[str, str]] = Counter()
    for row, count in zip(rows, counts.tolist(), strict=True):
        tokens[row] += int(count)
    return tokens


_SIGNATURE = (
    "void(float64[:, :, ::1], int32[:, :, ::1], float32[:, :, :, ::1], int32[::1], int32[::1], int64[::1], "
    "int64[::1], int64[::1], int32[::1], int32[::1], int32[:, ::1], float32[:, :, ::1])"
)


@numba.njit(_SIGNATURE, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _count(
    table: Any,
    at: Any,
    values: Any,
    table_of: Any,
    owner: Any,
    position: Any,
    settled: Any,
    limit: Any,
    slot: Any,
    rows: Any,
    numbers: Any,
    trace: Any,
) -> None:
    for t in range(owner.shape[0]):
        r = owner[t]
        number = table_of[r]
        if number < 0 or not settled[r] <= position[t] < limit[r]:
            continue
        for k in range(rows[slot[t]]):
            before, after, row = trace[t, k, 0], trace[t, k, 1], numbers[slot[t], k]
            if row < 0 or before != before:
                continue
            if position[t] >= limit[r] - WINDOW:
                # It takes the place of the one that is WINDOW positions older, which joins the totals.
                cell = position[t] % WINDOW
                older = at[number, row, cell]
                at[number, row, cell] = position[t]
                last = values[number, row, cell]
                before, last[0] = last[0], before
                after, last[1] = last[1], after
                if older < 0:
                    continue
            table[number, row, 0] += 1
            table[number, row, 1] += before
            table[number, row, 2] = max(table[number, row, 2], before)
            table[number, row, 3] += after
            table[number, row, 4] = max(table[number, row, 4], after)
            table[number, row, 5] += before > 0
            table[number, row, 6] += after < before
