"""Requests per minute, counted by key in this process."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from steerserve.errors import TooManyError

from .principal import Principal

__all__ = ["RateExceededError", "RateLimiter"]

_MINUTE = 60.0


class RateExceededError(TooManyError):
    """A key asked more often than its limit; `retry_after` are whole seconds until it may again."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(message, at=(), reason="rate")


class RateLimiter:
    """A sliding window: never more than `requests_per_minute` within any 60 seconds.

    Counted by the key's name, which is unique in its file: a key that is replaced under its name goes on
    where the old one stood.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._taken: dict[str, deque[float]] = {}

    def take(self, principal: Principal) -> None:
        """Count one request.

        Raises: RateExceededError, and then the request is not counted.
        """
        limit = principal.limits.requests_per_minute
        if limit is None:
            return
        now = self._clock()
        taken = self._taken.setdefault(principal.name, deque())
        while taken and taken[0] <= now - _MINUTE:
            taken.popleft()
        if len(taken) >= limit:
            wait = max(1, math.ceil(taken[len(taken) - limit] + _MINUTE - now))
            message = (
                f"expected at most {limit} requests a minute of key `{principal.name}`, got one more: "
                f"try again in {wait} s"
            )
            raise RateExceededError(message, retry_after=wait)
        taken.append(now)
