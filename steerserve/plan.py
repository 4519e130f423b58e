"""A steering request, compiled: what to change, where, and the digest that names it.

A plan is frozen, independent of the prompt, and small: ids and numbers, never vectors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from .catalog import Catalog
from .layout import Bits
from .row import Row
from .window import Selector, resolve

__all__ = ["Plan", "build_plan"]


@dataclass(frozen=True)
class Plan:
    """The rows of one request in canonical order; equal plans have equal digests.

    With `drop`, tokens that a row of the request selects get the reconstruction of the edited features
    (`error: "drop"`) instead of x plus the change.
    """

    rows: tuple[Row, ...]
    digest: str
    drop: bool = False

    @cached_property
    def wire(self) -> list[Any]:
        """As plain lists and numbers, for `SamplingParams.extra_args`."""
        return [self.digest, [row.wire for row in self.rows], self.drop]

    @classmethod
    def from_wire(cls, wire: Sequence[Any]) -> Plan:
        """The inverse of `wire`."""
        digest, rows, drop = wire
        return cls(tuple(Row.from_wire(row) for row in rows), digest, drop)

    @cached_property
    def bits(self) -> Bits:
        """Which bits of a token's mask mean which rows."""
        return Bits.of(self.rows)

    @cached_property
    def may_abort(self) -> bool:
        """Whether a row may end the request: by its conditions, or because it could not be held."""
        return bool(self.ending)

    @cached_property
    def notes(self) -> bool:
        """Whether anything is noted of a request: a row latches, or may end it."""
        return self.may_abort or any(row.latch for row in self.rows)

    @cached_property
    def ending(self) -> list[int]:
        """The rows that may end the request."""
        return [number for number, row in enumerate(self.rows) if row.effect in ("abort", "hold")]

    @cached_property
    def needs_history(self) -> bool:
        """Whether a prefix must be computed to know what happened in it, so that no cache may be read.

        The last token of a prompt is computed in any case, and generation begins there.
        """
        return any(row.is_stateful and row.window.phase != "generation" for row in self.rows)

    def selector(self, prompt_len: int) -> Selector:
        """The plan's windows, one for each bit, resolved for a prompt of `prompt_len` tokens."""
        return _resolved(self.bits.windows, prompt_len)


# Most plans share their windows: the engine core and the worker meet them again with every request.
_resolved = lru_cache(maxsize=64)(resolve)


def build_plan(rows: Iterable[Row], catalog: Catalog, drop: bool = False) -> Plan:
    """Rows that were checked, put in order and named by their digest."""
    ordered = tuple(sorted(rows, key=_order))
    return Plan(ordered, _digest(ordered, drop, catalog), drop)


def _order(row: Row) -> tuple[Any, ...]:
    return row.point, row.source, row.feature, row.effect, row.text


def _digest(rows: Sequence[Row], drop: bool, catalog: Catalog) -> str:
    keys = {row.source for row in rows} | {gate.source for row in rows for gate in row.gates}
    digest = hashlib.blake2b(b"drop" if drop else b"keep", digest_size=16)
    for row in rows:
        digest.update(row.text)
    digest.update(json.dumps([[key, catalog.sources[key].fingerprint] for key in sorted(keys)]).encode())
    return digest.hexdigest()
