"""Batches made ready by a thread while the step before them is computed."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

__all__ = ["prefetched"]

Item = TypeVar("Item")
_AHEAD = 2
_WAIT = 0.1


def prefetched(items: Iterator[Item]) -> Iterator[Item]:
    """The same items in the same order; an error in the thread is raised where its item would have come."""
    queue: Queue[tuple[str, Item | BaseException | None]] = Queue(_AHEAD)
    leave = Event()
    thread = Thread(target=_fill, args=(items, queue, leave), name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, item = queue.get()
            if kind == "item":
                yield item  # type: ignore[misc]
            elif isinstance(item, BaseException):
                raise item
            else:
                return
    finally:
        leave.set()
        while thread.is_alive():
            _drain(queue)
            thread.join(_WAIT)


def _fill(items: Iterator[Item], queue: Queue[tuple[str, Item | BaseException | None]], leave: Event) -> None:
    try:
        for item in items:
            if not _put(queue, ("item", item), leave):
                return
        _put(queue, ("end", None), leave)
    except BaseException as error:
        _put(queue, ("error", error), leave)


def _put(
    queue: Queue[tuple[str, Item | BaseException | None]],
    entry: tuple[str, Item | BaseException | None],
    leave: Event,
) -> bool:
    while not leave.is_set():
        try:
            queue.put(entry, timeout=_WAIT)
        except Full:
            continue
        return True
    return False


def _drain(queue: Queue[tuple[str, Item | BaseException | None]]) -> None:
    try:
        while True:
            queue.get_nowait()
    except Empty:
        pass
