from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from steerserve.slots import SlotTable
from tests.support.scale import amount, scaled

CAPACITY = 4


class Slots(RuleBasedStateMachine):
    """Requests come and go; what the table says is held against a plain count of holders."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(CAPACITY)
        self.holders: Counter[str] = Counter()
        self.written: dict[int, str] = {}

    @rule(digest=st.sampled_from("abcdefgh"))
    def acquire(self, digest: str) -> None:
        if digest not in self.holders and len(self.holders) == CAPACITY:
            with pytest.raises(RuntimeError):
                self.table.acquire(digest)
            return
        slot, fresh = self.table.acquire(digest)
        if fresh:
            assert all(self.written.get(slot) != held for held in self.holders)
            self.written[slot] = digest
        assert self.written[slot] == digest
        self.holders[digest] += 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.holders)))
        self.table.release(digest)
        self.holders[digest] -= 1
        self.holders += Counter()

    @precondition(lambda self: len(self.holders) < CAPACITY)
    @rule()
    def a_write_fails(self) -> None:
        slot, fresh = self.table.acquire("broken")
        assert fresh
        self.written.pop(slot, None)
        self.table.forget("broken")

    @invariant()
    def every_held_slot_is_counted(self) -> None:
        assert self.table.in_use == len(self.holders)


Slots.TestCase.settings = settings(max_examples=amount(200, 50), stateful_step_count=60, deadline=None)
TestSlots = scaled(Slots.TestCase)


def test_a_plan_that_returns_finds_its_rows_again() -> None:
    table = SlotTable(2)
    slot, _ = table.acquire("a")
    table.release("a")
    assert table.acquire("b") == (1 - slot, True)
    assert table.acquire("a") == (slot, False)
