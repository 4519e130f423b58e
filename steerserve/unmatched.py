"""Windows that match nothing: by themselves, which is refused, or in one prompt, which a report warns of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf

import numpy as np
from numpy.typing import NDArray

from .catalog import Catalog
from .errors import RequestError
from .plan import Plan
from .reach import LONGEST, can_match
from .spec import EVERYWHERE, Where
from .window import Window, resolve

__all__ = ["check_where", "unmatched_in"]


def check_where(where: Where, catalog: Catalog, at: Sequence[str | int]) -> None:
    """Refuse a window, or an entry of one of its lists, that can match no token of any prompt.

    Args: at: the place of `where` in the request or document.
    Raises: RequestError naming the field.
    """
    if where is EVERYWHERE:
        return
    _check_tokens(where, catalog, at)
    _check_positions(where, catalog, at)
    if where.start is not None or where.stop is not None:
        span = Window(where.phase, where.start, where.stop)
        if not can_match(span, (), catalog.max_len):
            _refuse(_empty_span(where, catalog), at)
    if not can_match(Window.of(where), catalog.special_tokens, catalog.max_len):
        _refuse("expected a window that leaves some token, got one that excludes all that it includes", at)


def unmatched_in(
    plan: Plan, prompt: Sequence[int], max_tokens: int | None, catalog: Catalog
) -> Iterator[int]:
    """The interventions of a request whose windows match nothing of one prompt, nor can in its reply.

    Args:
        prompt: its token ids.
        max_tokens: of the reply, the most; None if only the model's length limits it.
    Returns: their places in the request.
    """
    last = len(prompt) - 1 + max_tokens if max_tokens is not None else LONGEST
    for row in plan.rows:
        if not row.origin.policy and not _may_match(row.window, prompt, last, catalog):
            yield row.origin.index


def _may_match(window: Window, prompt: Sequence[int], end: int, catalog: Catalog) -> bool:
    """Args: end: the first position that the model never reads."""
    if window.generates and window.is_whole_phase:
        return True
    selector, n = resolve([window], len(prompt)), len(prompt)
    ids = np.asarray(prompt, dtype=np.int64)
    if selector.masks(0, ids, catalog.special_mask).any():
        return True
    ends: NDArray[np.int64] = np.append(selector.starts[1:], LONGEST)
    in_reply = (selector.starts < end) & (ends > n)
    return bool(((selector.base | selector.eligible)[in_reply] != 0).any()) and end > n


def _check_tokens(where: Where, catalog: Catalog, at: Sequence[str | int]) -> None:
    for name in ("tokens", "exclude_tokens"):
        for index, token in enumerate(getattr(where, name) or ()):
            if token >= (catalog.vocab or inf):
                message = f"expected a token id < {catalog.vocab}, the size of the vocabulary, got {token}"
                raise RequestError(message, at=(*at, name, index), reason="out_of_range")


def _check_positions(where: Where, catalog: Catalog, at: Sequence[str | int]) -> None:
    for index, position in enumerate(where.positions or ()):
        if not can_match(Window(where.phase, positions=(position,)), (), catalog.max_len):
            message = f"expected a position that `phase` {where.phase!r} can have{_limit(catalog)}"
            raise RequestError(
                f"{message}, got {position}", at=(*at, "positions", index), reason="out_of_range"
            )
    for index, position in enumerate(where.exclude_positions):
        if not can_match(Window(positions=(position,)), (), catalog.max_len):
            message = f"expected a position that a request can have{_limit(catalog)}, got {position}"
            raise RequestError(message, at=(*at, "exclude_positions", index), reason="out_of_range")


def _empty_span(where: Where, catalog: Catalog) -> str:
    start, stop = where.start, where.stop
    if start is not None and stop is not None and (start < 0) is (stop < 0) and start >= stop:
        return f"expected `start` < `stop`, got {start} and {stop}: that leaves no position"
    edges = {"start": start, "stop": stop}
    given = " and ".join(f"`{name}` {at}" for name, at in edges.items() if at is not None)
    wanted = f"some position of `phase` {where.phase!r} between `start` and `stop`{_limit(catalog)}"
    # What a negative number means is said where it is most often mistaken.
    why = ": negative numbers count from the prompt's end" if min(start or 0, stop or 0) < 0 else ""
    return f"expected {wanted}, got {given}{why}"


def _limit(catalog: Catalog) -> str:
    return f" in a sequence of {catalog.max_len} tokens, the model's length" if catalog.max_len else ""


def _refuse(message: str, at: Sequence[str | int]) -> None:
    raise RequestError(message, at=at, reason="empty_window")
