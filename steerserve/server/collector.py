"""Asks the workers for reports, many at a time: requests that end together share one call to the engine."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

from steerserve.metrics import TokenFeed, admissions, observe_report, observe_slots
from steerserve.report import Collected, TicketTally, merge_workers

__all__ = ["CollectRpc", "ReportCollector"]

logger = logging.getLogger(__name__)

# The workers keep no more finished reports than this either.
_MOST_ABANDONED = 4096


class CollectRpc(Protocol):
    """Calls `steerserve_collect` on every worker of every replica.

    Args: tickets: of each, its requests' ends (see `Runtime.collect`).
    """

    def __call__(self, tickets: dict[str, dict[str, int]], /) -> Awaitable[Iterable[Mapping[str, Any]]]: ...


class ReportCollector:
    """Batches report requests, and keeps the engine-side metrics fresh.

    Args:
        rpc: the call to the engine.
        feeds_tokens: whether this process, of several API servers, feeds the token counter.
        several_servers: whether others admit requests that this process cannot see.
        window: seconds that the first of a batch waits for others.
        timeout: seconds after which a reply goes out with its report marked incomplete.
        patience: seconds that a batch waits for the call before it, should that one hang.
    """

    def __init__(
        self,
        rpc: CollectRpc,
        *,
        feeds_tokens: bool = True,
        several_servers: bool = False,
        window: float = 0.002,
        timeout: float = 5.0,
        patience: float = 0.5,
    ) -> None:
        self._rpc = rpc
        self._feed = TokenFeed() if feeds_tokens else None
        self._several_servers = several_servers
        self._window = window
        self._timeout = timeout
        self._patience = patience
        self._waiting: dict[str, asyncio.Future[TicketTally | None]] = {}
        self._abandoned: dict[str, dict[str, int]] = {}
        self._ends: dict[str, dict[str, int]] = {}
        self._asking: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._refreshing: asyncio.Task[None] | None = None
        self._admissions_shown = 0
        self._slots_in_use = 0

    async def collect(self, ticket: str, ends: dict[str, int] | None = None) -> TicketTally | None:
        """What the workers counted for a ticket, and then forgot; None if they do not answer in time.

        What was not answered, or not waited for, is given up: the workers need not keep it.

        Args: ends: where its requests ended, behind which nothing counts.
        """
        started = time.perf_counter()
        self._ends[ticket] = ends or {}
        future: asyncio.Future[TicketTally | None] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = future
        if self._asking is None or self._asking.done():
            self._asking = _spawn(self._ask_in_batches)
        found = None
        try:
            found = await asyncio.wait_for(future, self._timeout)
        except TimeoutError:
            pass
        finally:
            self._waiting.pop(ticket, None)
            ends = self._ends.pop(ticket, None)
            if found is None:
                self.abandon(ticket, ends)
            observe_report(time.perf_counter() - started)
        return found

    def abandon(self, ticket: str, ends: dict[str, int] | None = None) -> None:
        """Nobody will come for this report: have the workers forget it at the next refresh."""
        if len(self._abandoned) < _MOST_ABANDONED:
            self._abandoned[ticket] = ends or {}

    def start(self, every: float = 5.0) -> None:
        """Refresh the metrics in the background whenever there can be something new; on the running loop."""
        self._refreshing = _spawn(lambda: self._refresh_forever(every))

    async def stop(self) -> None:
        """End the background work."""
        for task in (self._refreshing, self._asking, *self._calls):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _refresh_forever(self, every: float) -> None:
        while True:
            await asyncio.sleep(every)
            if self._is_stale():
                await self._ask({})

    def _is_stale(self) -> bool:
        seen_all = self._admissions_shown == admissions() and self._slots_in_use == 0
        return self._several_servers or bool(self._abandoned) or not seen_all

    async def _ask_in_batches(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._window)
            batch, self._waiting = self._waiting, {}
            call = _spawn(partial(self._ask, batch))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
            await asyncio.wait({call}, timeout=self._patience)

    async def _ask(self, batch: dict[str, asyncio.Future[TicketTally | None]]) -> None:
        """One call for the whole batch. Whatever goes wrong, every future of it is answered.

        If the call fails, nobody knows what the workers heard of it: what they are to forget is said again.
        """
        abandoned, self._abandoned = self._abandoned, {}
        asked = {ticket: self._ends.get(ticket, {}) for ticket in batch} | abandoned
        admitted = admissions()
        collected = Collected()
        try:
            replies = await asyncio.wait_for(self._rpc(asked), self._timeout)
            collected = merge_workers(replies)
            self._show(collected, admitted)
            abandoned = {}
        except Exception as error:
            logger.warning("The engine did not answer for %d reports: %r", len(batch), error)
        finally:
            for ticket, ends in abandoned.items():
                self.abandon(ticket, ends)
            for ticket, future in batch.items():
                if not future.done():
                    future.set_result(collected.tallies.get(ticket))

    def _show(self, collected: Collected, admitted: int) -> None:
        observe_slots(collected)
        if self._feed is not None:
            self._feed.update(collected)
        self._admissions_shown = admitted
        self._slots_in_use = collected.slots_in_use


def _spawn(work: Callable[[], Any]) -> asyncio.Task[None]:
    """A task with a context of its own: the steering of the request that happens to start it is not its."""
    return asyncio.get_running_loop().create_task(work(), context=contextvars.Context())
