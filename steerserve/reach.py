"""Where windows can reach, over all prompts: whether one can match at all, and whether two can meet.

A window is written relative to a prompt whose length n is not known. What it includes is a union of parts:
bounds on n, on the position p and on d = p − n (differences of two unknowns, so that all bounds are made
tight in one step), listed values of p or of d, and which tokens. Whatever cannot be proved to be empty counts
as something that can be reached.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from .window import Window

__all__ = ["LONGEST", "Place", "can_match", "meeting"]

# The longest sequence there is where the model's own limit is not known.
LONGEST = 2**31 - 1
# How many prompts, and how many positions of each, are looked at one by one where lists exclude positions.
_SEARCHED = 128

Bounds = tuple[int, int]
Values = frozenset[int]


@dataclass(frozen=True)
class Place:
    """Position `position` of a request whose prompt has `prompt_len` tokens."""

    prompt_len: int
    position: int

    def __str__(self) -> str:
        if self.position == self.prompt_len - 1:
            return "the prompt's last token"
        tokens = "1 token" if self.prompt_len == 1 else f"{self.prompt_len} tokens"
        return f"position {self.position}, with a prompt of {tokens}"


@dataclass(frozen=True)
class _Part:
    """Positions p of prompts of n tokens, by inclusive bounds on p, n and d = p − n.

    `absolute` and `from_end` are the only values of p and of d, and `tokens` the only tokens; None for all.
    """

    p: Bounds
    n: Bounds
    d: Bounds
    absolute: Values | None = None
    from_end: Values | None = None
    tokens: Values | None = None

    def meet(self, other: _Part) -> _Part:
        """What lies in both."""
        bounds = (_both(self.p, other.p), _both(self.n, other.n), _both(self.d, other.d))
        lists = (
            (self.absolute, other.absolute),
            (self.from_end, other.from_end),
            (self.tokens, other.tokens),
        )
        return _Part(*bounds, *(_common(*pair) for pair in lists))

    def within(self, *, p: Bounds | None = None, d: Bounds | None = None) -> _Part:
        """Cut to these bounds."""
        return replace(self, p=_both(self.p, p or self.p), d=_both(self.d, d or self.d))

    @property
    def tight(self) -> _Part | None:
        """The same with bounds that are reached, lists left aside; None where it is empty."""
        p = _both(self.p, (self.n[0] + self.d[0], self.n[1] + self.d[1]))
        n = _both(self.n, (self.p[0] - self.d[1], self.p[1] - self.d[0]))
        d = _both(self.d, (self.p[0] - self.n[1], self.p[1] - self.n[0]))
        return None if any(low > high for low, high in (p, n, d)) else replace(self, p=p, n=n, d=d)

    def find(self, absolute: Values, from_end: Values) -> Place | None:
        """A place in it that is not excluded, whatever its token; None if there is none for certain.

        Args: absolute, from_end: excluded values of p and of d.
        """
        part: _Part | None = self
        while part is not None:
            trimmed = replace(part, p=_trim(part.p, absolute), d=_trim(part.d, from_end)).tight
            if trimmed == part:
                return (
                    part._listed(absolute, from_end) if part._has_lists else part._search(absolute, from_end)
                )
            part = trimmed
        return None

    @property
    def _has_lists(self) -> bool:
        return self.absolute is not None or self.from_end is not None

    def _listed(self, absolute: Values, from_end: Values) -> Place | None:
        """Each listed value leaves one unknown."""
        if self.absolute is None:
            parts = (self.within(d=(d, d)) for d in sorted((self.from_end or frozenset()) - from_end))
            unlisted = (replace(part, from_end=None) for part in parts)
        else:
            parts = (self.within(p=(p, p)) for p in sorted(self.absolute - absolute))
            unlisted = (replace(part, absolute=None) for part in parts)
        found = (part.tight for part in unlisted)
        return next((place for part in found if part and (place := part.find(absolute, from_end))), None)

    def _search(self, absolute: Values, from_end: Values) -> Place | None:
        lengths = range(self.n[0], self.n[1] + 1)
        complete = len(lengths) <= _SEARCHED
        for n in lengths[:_SEARCHED]:
            positions = range(max(self.p[0], n + self.d[0]), min(self.p[1], n + self.d[1]) + 1)
            complete = complete and len(positions) <= _SEARCHED
            for p in positions[:_SEARCHED]:
                if p not in absolute and p - n not in from_end:
                    return Place(n, p)
        return None if complete else Place(self.n[0], max(self.p[0], self.n[0] + self.d[0]))


def can_match(window: Window, special: Collection[int], longest: int | None) -> bool:
    """Whether some token of some prompt could be in a window.

    Args:
        special: ids of the special tokens.
        longest: the model's greatest length, prompt and reply together; None if it is not known.
    """
    return _place([window], _parts(window, longest or LONGEST), special) is not None


def meeting(first: Window, second: Window, special: Collection[int], longest: int | None) -> Place | None:
    """A place at which some token would be in both windows; None if there is none for certain.

    Args: as `can_match`.
    """
    pairs = (
        one.meet(other)
        for one in _parts(first, longest or LONGEST)
        for other in _parts(second, longest or LONGEST)
    )
    return _place([first, second], pairs, special)


def _place(windows: list[Window], parts: Iterable[_Part], special: Collection[int]) -> Place | None:
    """A place in one of these parts, at which a token is in all of the windows."""
    excluded = {at for window in windows for at in window.exclude_positions}
    absolute, from_end = (
        frozenset(at for at in excluded if at >= 0),
        frozenset(at for at in excluded if at < 0),
    )
    barred = frozenset(token for window in windows for token in window.exclude_tokens)
    for part in parts:
        # Of ordinary tokens there are always some that are not excluded.
        tokens = None if part.tokens is None else part.tokens - barred
        if tokens is not None and tokens <= frozenset(special):
            if not tokens or not all(window.special_tokens or window.generates for window in windows):
                continue
            if not all(window.special_tokens for window in windows):
                part = part.within(d=(-1, -1))
        found = part.find(absolute, from_end)
        if found is not None:
            return found
    return None


def _parts(window: Window, longest: int) -> Iterator[_Part]:
    """What a window includes, without what it excludes."""
    phase = {"prompt": (-LONGEST, -1), "generation": (-1, LONGEST)}.get(window.phase, (-LONGEST, LONGEST))
    whole = _Part((0, longest - 1), (1, longest), phase)
    absolute = frozenset(at for at in window.positions if at >= 0)
    from_end = frozenset(at for at in window.positions if at < 0)
    if absolute:
        yield replace(whole, absolute=absolute)
    if from_end:
        yield replace(whole, from_end=from_end)
    if window.tokens:
        yield replace(whole, tokens=frozenset(window.tokens))
    if window.start is not None or window.stop is not None:
        yield _span(window, whole)
    elif not window.positions and not window.tokens:
        yield whole


def _span(window: Window, whole: _Part) -> _Part:
    """`start` and `stop`, which count from the phase's first position, or from the prompt's end."""
    for edge, is_start in ((window.start, True), (window.stop, False)):
        if edge is None:
            continue
        last = edge if is_start else edge - 1
        if edge >= 0 and window.phase != "generation":
            whole = whole.within(p=(last, LONGEST) if is_start else (0, last))
            continue
        # Generation begins at p = n − 1.
        last -= 1 if edge >= 0 else 0
        whole = whole.within(d=(last, LONGEST) if is_start else (-LONGEST, last))
    return whole


def _both(first: Bounds, second: Bounds) -> Bounds:
    return max(first[0], second[0]), min(first[1], second[1])


def _common(first: Values | None, second: Values | None) -> Values | None:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _trim(bounds: Bounds, excluded: Values) -> Bounds:
    """Without excluded values at either end."""
    low, high = bounds
    while low <= high and low in excluded:
        low += 1
    while low <= high and high in excluded:
        high -= 1
    return low, high
