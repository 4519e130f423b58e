"""One row of a plan: a change to one feature, where it applies and under which conditions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from .window import Window

__all__ = ["Effect", "Gate", "Origin", "Row"]

Effect = Literal["edit", "force", "hold", "observe", "abort"]


@dataclass(frozen=True)
class Gate:
    """The row applies only where `above` < f < `below` for this feature of this source, at its hook point."""

    source: str
    feature: int
    above: float
    below: float
    point: int

    @property
    def wire(self) -> list[Any]:
        """As plain strings and numbers."""
        return [self.source, self.feature, self.above, self.below, self.point]


@dataclass(frozen=True)
class Origin:
    """Who asked for a row: an entry of the request, or of a policy. No part of what a plan is."""

    index: int
    policy: str = ""
    watch: str = ""


@dataclass(frozen=True)
class Row:
    """One feature's change: f' = min(max(a·f + c, lo), hi), inside `window`, where every gate holds.

    `effect` says what becomes of f': "edit" applies it for the request; "force" applies it for a policy;
    "hold" applies it for a policy and keeps f at or under it in what the hook point passes on, whatever other
    rows do; "observe" counts it and changes nothing; "abort" ends the request where the gates hold. With
    `latch` the row applies from the first position on at which the gates held.
    """

    point: int
    source: str
    feature: int
    op: str
    a: float
    c: float
    lo: float
    hi: float
    gates: tuple[Gate, ...]
    window: Window
    effect: Effect = "edit"
    latch: bool = False
    origin: Origin = field(default=Origin(0), compare=False)

    @cached_property
    def wire(self) -> list[Any]:
        """As plain lists and numbers."""
        gates = [gate.wire for gate in self.gates]
        edit = [self.a, self.c, self.lo, self.hi]
        head = [self.point, self.source, self.feature, self.op, *edit, gates, self.window.wire]
        return [*head, self.effect, self.latch]

    @cached_property
    def text(self) -> bytes:
        """What a digest takes of the row."""
        return json.dumps(self.wire).encode()

    @property
    def earlier(self) -> tuple[Gate, ...]:
        """The gates at hook points before the row's own."""
        return tuple(gate for gate in self.gates if gate.point != self.point)

    @property
    def applies(self) -> bool:
        """Whether the row changes the stream."""
        return self.effect in ("edit", "force", "hold")

    @property
    def is_stateful(self) -> bool:
        """Whether what happens at a position depends on positions before it."""
        return self.latch or self.effect == "abort"

    @classmethod
    def from_wire(cls, wire: Sequence[Any]) -> Row:
        """The inverse of `wire`."""
        point, source, feature, op, a, c, lo, hi, gates, window, effect, latch = wire
        own = tuple(Gate(*gate) for gate in gates)
        return cls(point, source, feature, op, a, c, lo, hi, own, Window.from_wire(window), effect, latch)
