"""Plan digest → slot: shared by equal plans, counted by reference, and remembered after the last release."""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["SlotTable"]


class SlotTable:
    """A fixed number of slots, each holding the rows of one plan.

    With as many slots as requests can run at once, `acquire` never fails for a running request. A slot that
    nobody holds keeps its rows until another plan needs the place (least recently used first), so that a plan
    that returns costs nothing.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._slot_of: dict[str, int] = {}
        self._holders: dict[str, int] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._empty = list(range(capacity - 1, -1, -1))

    @property
    def in_use(self) -> int:
        """Slots that at least one request holds."""
        return len(self._holders)

    def acquire(self, digest: str) -> tuple[int, bool]:
        """Hold the slot of a plan.

        Returns: (slot, fresh); `fresh` means that the caller must write the plan's rows into it.
        Raises: RuntimeError if more distinct plans are held than there are slots.
        """
        if digest in self._slot_of:
            self._idle.pop(digest, None)
            self._holders[digest] = self._holders.get(digest, 0) + 1
            return self._slot_of[digest], False
        slot = self._take_slot()
        self._slot_of[digest] = slot
        self._holders[digest] = 1
        return slot, True

    def release(self, digest: str) -> None:
        """Give back one hold on a plan's slot.

        Raises: KeyError if nobody holds it.
        """
        self._holders[digest] -= 1
        if self._holders[digest] == 0:
            del self._holders[digest]
            self._idle[digest] = None

    def forget(self, digest: str) -> None:
        """Drop a hold together with the slot's contents: its rows could not be written."""
        self.release(digest)
        if digest in self._idle:
            del self._idle[digest]
            self._empty.append(self._slot_of.pop(digest))

    def _take_slot(self) -> int:
        if self._empty:
            return self._empty.pop()
        if not self._idle:
            raise RuntimeError(f"all {self.capacity} steering slots are held by running requests")
        oldest, _ = self._idle.popitem(last=False)
        return self._slot_of.pop(oldest)
