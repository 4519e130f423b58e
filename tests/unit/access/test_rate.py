from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.access.limits import Limits
from steerserve.access.principal import ANYONE, Principal
from steerserve.access.rate import RateExceededError, RateLimiter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def held_to(limit: int, name: str = "team") -> Principal:
    return Principal(name, frozenset({"infer"}), Limits(requests_per_minute=limit))


def test_the_request_beyond_the_limit_is_refused_and_told_when_to_come_back() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    limiter.take(held_to(2))
    clock.now += 10
    limiter.take(held_to(2))
    clock.now += 5.5
    with pytest.raises(RateExceededError, match="at most 2 requests a minute of key `team`") as caught:
        limiter.take(held_to(2))
    assert caught.value.status == 429
    assert caught.value.retry_after == 45


def test_after_the_time_that_was_told_the_next_request_passes() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    limiter.take(held_to(1))
    with pytest.raises(RateExceededError) as caught:
        limiter.take(held_to(1))
    clock.now += caught.value.retry_after
    limiter.take(held_to(1))


def test_a_refused_request_is_not_counted() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    limiter.take(held_to(1))
    for _ in range(5):
        clock.now += 10
        with pytest.raises(RateExceededError):
            limiter.take(held_to(1))
    clock.now += 10
    limiter.take(held_to(1))


def test_keys_are_counted_apart() -> None:
    limiter = RateLimiter(Clock())
    limiter.take(held_to(1, "a"))
    limiter.take(held_to(1, "b"))
    with pytest.raises(RateExceededError):
        limiter.take(held_to(1, "a"))


def test_a_limit_that_was_lowered_counts_what_was_taken_before() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    for _ in range(3):
        limiter.take(held_to(3))
        clock.now += 10
    with pytest.raises(RateExceededError) as caught:
        limiter.take(held_to(1))
    assert caught.value.retry_after == 50


def test_without_a_limit_nothing_is_counted() -> None:
    limiter = RateLimiter(Clock())
    for _ in range(1000):
        limiter.take(ANYONE)


@given(st.lists(st.floats(0, 40), max_size=60), st.integers(1, 5))
def test_no_minute_ever_holds_more_than_the_limit(gaps: list[float], limit: int) -> None:
    clock = Clock()
    limiter = RateLimiter(clock)

    def passed() -> Iterator[float]:
        for gap in gaps:
            clock.now += gap
            try:
                limiter.take(held_to(limit))
            except RateExceededError:
                continue
            yield clock.now

    times = list(passed())
    assert all(sum(now - 60 < then <= now for then in times) <= limit for now in times)
    assert len(times) >= min(limit, len(gaps))
