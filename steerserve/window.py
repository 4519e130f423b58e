"""Which rows of a plan apply to which token: `where`, resolved for one request.

A window is written relative to the prompt; a `Selector` is the same thing for a prompt of known length, as
bits: bit i of a mask says that row i of the plan applies. It depends on a token's position and id alone,
never on how the scheduler cut the prompt into chunks.

Special tokens are left alone unless a window asks for them, but for one: the prompt's last token, from whose
position the first token of the reply is sampled. Generation begins there, whatever a chat template ends in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .spec import EVERYWHERE, Where

__all__ = ["Selector", "Window", "resolve"]

Int64 = NDArray[np.int64]
END = 2**31 - 1
_ALL_BITS = -1


@dataclass(frozen=True)
class Window:
    """A frozen `where`. Ends left open are None; lists are sorted tuples."""

    phase: str = "all"
    start: int | None = None
    stop: int | None = None
    positions: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    exclude_positions: tuple[int, ...] = ()
    exclude_tokens: tuple[int, ...] = ()
    special_tokens: bool = False

    @classmethod
    def of(cls, where: Where) -> Window:
        """The window that a request's `where` asks for."""
        if where is EVERYWHERE:
            return _EVERYWHERE

        def ordered(values: Sequence[int] | None) -> tuple[int, ...]:
            return tuple(sorted(set(values or ())))

        return cls(
            phase=where.phase,
            start=where.start,
            stop=where.stop,
            positions=ordered(where.positions),
            tokens=ordered(where.tokens),
            exclude_positions=ordered(where.exclude_positions),
            exclude_tokens=ordered(where.exclude_tokens),
            special_tokens=where.special_tokens,
        )

    @cached_property
    def wire(self) -> list[Any]:
        """The fields in order, as plain lists and numbers."""
        fields = (getattr(self, name) for name in self.__dataclass_fields__)
        return [list(value) if isinstance(value, tuple) else value for value in fields]

    @classmethod
    def from_wire(cls, fields: Sequence[Any]) -> Window:
        """The inverse of `wire`."""
        values: list[Any] = [tuple(v) if isinstance(v, list | tuple) else v for v in fields]
        return cls(*values)

    @property
    def is_everywhere(self) -> bool:
        """Whether it includes every position, whatever the prompt's length; token ids may matter.

        A window that leaves special tokens alone does not at the end of the prompt.
        """
        placed = self.positions or self.exclude_positions or self.start is not None or self.stop is not None
        return self.phase == "all" and self.special_tokens and not placed

    def phase_span(self, prompt_len: int) -> tuple[int, int]:
        """Half-open range of positions of the phase. Generation starts at the last prompt token."""
        if self.phase == "prompt":
            return 0, prompt_len
        return (prompt_len - 1 if self.phase == "generation" else 0), END

    @property
    def is_whole_phase(self) -> bool:
        """Whether it includes all of its phase, whatever the tokens are."""
        placed = self.start is not None or self.stop is not None or self.positions or self.tokens
        return not (placed or self.exclude_positions or self.exclude_tokens)

    @property
    def generates(self) -> bool:
        """Whether the position that samples the first token is the phase's, be its token special or not."""
        return self.phase != "prompt"

    def included(self, prompt_len: int) -> list[tuple[int, int]]:
        """Half-open ranges that are included by position, not yet cut to the phase."""
        low, high = self.phase_span(prompt_len)
        ranges = [(at, at + 1) for at in _from_end(self.positions, prompt_len)]
        if self.start is not None or self.stop is not None:
            ranges.append((_edge(self.start, low, prompt_len, low), _edge(self.stop, low, prompt_len, high)))
        elif not self.positions and not self.tokens:
            ranges.append((low, high))
        return ranges


_EVERYWHERE = Window()


@dataclass(frozen=True)
class Selector:
    """The windows of all rows of a plan, for a prompt of one length.

    `starts` [n] are positions at which anything changes, ascending from 0; from `starts[i]` on, `base[i]`
    holds the rows that are included by position and `eligible[i]` those that a listed token would include.
    `special_ok[i]` holds the rows that touch special tokens there. `token_ids` [m] ascending are the tokens
    that rows name, with the rows that each one includes and excludes.
    """

    starts: Int64
    base: Int64
    eligible: Int64
    special_ok: Int64
    token_ids: Int64
    token_include: Int64
    token_exclude: Int64

    def masks(self, first: int, token_ids: Int64, special: NDArray[np.bool_]) -> Int64:
        """Row masks of consecutive tokens.

        Args:
            first: position of the first of them.
            token_ids: [n] their ids.
            special: [vocab] which ids are special tokens.
        Returns: [n] int64, bit i set where row i applies.
        """
        at = np.searchsorted(self.starts, np.arange(first, first + len(token_ids)), side="right") - 1
        masks = self.base[at]
        if len(self.token_ids):
            found = np.minimum(np.searchsorted(self.token_ids, token_ids), len(self.token_ids) - 1)
            named = self.token_ids[found] == token_ids
            masks = masks | np.where(named, self.token_include[found] & self.eligible[at], 0)
            masks = masks & ~np.where(named, self.token_exclude[found], 0)
        if (self.special_ok != _ALL_BITS).any():
            known = np.clip(token_ids, 0, len(special) - 1)
            is_special = special[known] & (token_ids < len(special))
            masks = np.where(is_special, masks & self.special_ok[at], masks)
        return masks


def resolve(windows: Sequence[Window], prompt_len: int) -> Selector:
    """Resolve the windows of a plan's rows (at most 64) for a prompt of `prompt_len` tokens."""
    spans = [window.phase_span(prompt_len) for window in windows]
    included = [window.included(prompt_len) for window in windows]
    excluded = [[(at, at + 1) for at in _from_end(w.exclude_positions, prompt_len)] for w in windows]
    edges = {0}
    if not all(window.special_tokens for window in windows):
        edges |= {prompt_len - 1, prompt_len}
    for span, inside, outside in zip(spans, included, excluded, strict=True):
        edges.update(max(0, edge) for pair in (span, *inside, *outside) for edge in pair)
    starts = np.array(sorted(edges), dtype=np.int64)

    base = np.zeros(len(starts), dtype=np.uint64)
    eligible = np.zeros(len(starts), dtype=np.uint64)
    for row, window in enumerate(windows):
        bit = np.uint64(1) << np.uint64(row)
        allowed = _covers(starts, [spans[row]]) & ~_covers(starts, excluded[row])
        base[allowed & _covers(starts, included[row])] |= bit
        if window.tokens:
            eligible[allowed] |= bit

    named = sorted({token for window in windows for token in (*window.tokens, *window.exclude_tokens)})
    return Selector(
        starts=starts,
        base=base.view(np.int64),
        eligible=eligible.view(np.int64),
        special_ok=np.where(starts == prompt_len - 1, *_special_ok(windows)),
        token_ids=np.array(named, dtype=np.int64),
        token_include=_bits([[token in w.tokens for w in windows] for token in named]),
        token_exclude=_bits([[token in w.exclude_tokens for w in windows] for token in named]),
    )


def _special_ok(windows: Sequence[Window]) -> tuple[int, int]:
    """The rows that touch special tokens: at the end of the prompt, and elsewhere."""
    if all(window.special_tokens for window in windows):
        return _ALL_BITS, _ALL_BITS
    at_end, elsewhere = _bits(
        [[w.special_tokens or w.generates for w in windows], [w.special_tokens for w in windows]]
    ).tolist()
    return at_end, elsewhere


def _bits(table: Sequence[Sequence[bool]]) -> Int64:
    rows = [sum(1 << i for i, flag in enumerate(flags) if flag) for flags in table]
    return np.array(rows, dtype=np.uint64).view(np.int64)


def _from_end(positions: Sequence[int], prompt_len: int) -> list[int]:
    places = (at + prompt_len if at < 0 else at for at in positions)
    return [at for at in places if at >= 0]


def _edge(value: int | None, base: int, prompt_len: int, default: int) -> int:
    if value is None:
        return default
    return min(END, max(0, prompt_len + value if value < 0 else base + value))


def _covers(starts: Int64, ranges: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    covered = np.zeros(len(starts), dtype=np.bool_)
    for low, high in ranges:
        covered |= (starts >= low) & (starts < high)
    return covered
