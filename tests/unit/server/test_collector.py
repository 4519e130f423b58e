import asyncio
import time
from typing import Any

import pytest

from steerserve.server.collector import ReportCollector


def reply(tickets: dict[str, dict[str, int]], *, in_use: int = 0, tokens: int = 0) -> dict[str, Any]:
    return {
        "tallies": {ticket: [[[0, -1, 2, 1.0, 1.0, 1.0, 1.0, 2, 0]]] for ticket in tickets},
        "requests": dict.fromkeys(tickets, 1),
        "inexact": [],
        "tokens": [["sae:demo", "add", tokens]],
        "slots": {"in_use": in_use, "capacity": 4},
    }


class Workers:
    """Answers after `delay` seconds, and remembers what it was asked."""

    def __init__(self, delay: float = 0.0, error: Exception | None = None, in_use: int = 0) -> None:
        self.delay, self.error, self.in_use = delay, error, in_use
        self.asked: list[dict[str, dict[str, int]]] = []

    async def are_asked(self, times: int) -> None:
        async with asyncio.timeout(10):
            while len(self.asked) < times:
                await asyncio.sleep(0.005)

    async def __call__(self, tickets: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
        self.asked.append(tickets)
        await asyncio.sleep(self.delay)
        if self.error:
            raise self.error
        return [reply(tickets, in_use=self.in_use)]


def test_requests_that_end_together_share_one_call() -> None:
    workers = Workers()

    async def go() -> list[Any]:
        collector = ReportCollector(workers)
        return await asyncio.gather(*(collector.collect(str(n)) for n in range(100)))

    tallies = asyncio.run(go())
    assert all(tally.requests == 1 for tally in tallies)
    assert [len(batch) for batch in workers.asked] == [100]


def test_under_load_there_is_one_call_at_a_time() -> None:
    workers = Workers(delay=0.02)

    async def one(collector: ReportCollector, n: int) -> Any:
        await asyncio.sleep(n * 0.0005)
        return await collector.collect(str(n))

    async def go() -> list[Any]:
        collector = ReportCollector(workers)
        return await asyncio.gather(*(one(collector, n) for n in range(200)))

    assert None not in asyncio.run(go())
    assert len(workers.asked) < 20
    assert sum(map(len, workers.asked)) == 200


def test_workers_that_do_not_answer_delay_a_reply_no_longer_than_the_timeout() -> None:
    async def go() -> Any:
        return await ReportCollector(Workers(delay=60), timeout=0.05).collect("a")

    started = time.monotonic()
    assert asyncio.run(go()) is None
    assert time.monotonic() - started < 10


def test_a_dead_engine_answers_every_waiting_report_with_nothing() -> None:
    async def go() -> list[Any]:
        collector = ReportCollector(Workers(error=RuntimeError("the engine died")))
        first = await asyncio.gather(collector.collect("a"), collector.collect("b"))
        return [*first, await collector.collect("c")]

    assert asyncio.run(go()) == [None, None, None]


def test_a_malformed_answer_is_no_answer() -> None:
    async def rpc(tickets: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
        return [{"tallies": 7}]

    async def go() -> Any:
        return await ReportCollector(rpc).collect("a")

    assert asyncio.run(go()) is None


def test_a_caller_that_is_cancelled_disturbs_nobody_else() -> None:
    async def go() -> Any:
        collector = ReportCollector(Workers(delay=0.02))
        leaving = asyncio.create_task(collector.collect("a"))
        staying = asyncio.create_task(collector.collect("b"))
        await asyncio.sleep(0.01)
        leaving.cancel()
        return await staying

    assert asyncio.run(go()).requests == 1


def test_an_abandoned_ticket_is_forgotten_with_the_next_refresh() -> None:
    workers = Workers()

    async def go() -> None:
        collector = ReportCollector(workers)
        collector.start(every=0.01)
        collector.abandon("gone", {"r": 7})
        await asyncio.sleep(0.1)
        await collector.stop()

    asyncio.run(go())
    assert workers.asked == [{"gone": {"r": 7}}]


class Hanging(Workers):
    """Never answers the first call."""

    async def __call__(self, tickets: list[str]) -> list[dict[str, Any]]:
        if not self.asked:
            self.asked.append(tickets)
            await asyncio.Event().wait()
        return await super().__call__(tickets)


def test_a_call_that_hangs_holds_up_nobody_behind_it() -> None:
    async def go() -> Any:
        collector = ReportCollector(Hanging(), timeout=600)
        lost = asyncio.create_task(collector.collect("a"))
        await asyncio.sleep(0.02)
        try:
            return await asyncio.wait_for(collector.collect("b"), 60)
        finally:
            lost.cancel()
            await collector.stop()

    assert asyncio.run(go()).requests == 1


def test_a_ticket_that_was_not_answered_in_time_is_given_up() -> None:
    workers = Hanging()

    async def go() -> None:
        collector = ReportCollector(workers, timeout=0.05)
        assert await collector.collect("late") is None
        collector.start(every=0.01)
        await workers.are_asked(2)
        await collector.stop()

    asyncio.run(go())
    assert workers.asked[1] == {"late": {}}


def test_a_ticket_whose_caller_left_is_given_up() -> None:
    workers = Hanging()

    async def go() -> None:
        collector = ReportCollector(workers, timeout=600, patience=0.01)
        leaving = asyncio.create_task(collector.collect("left"))
        await workers.are_asked(1)
        leaving.cancel()
        collector.start(every=0.01)
        await workers.are_asked(2)
        await collector.stop()

    asyncio.run(go())
    assert workers.asked[1] == {"left": {}}


def test_what_the_workers_did_not_hear_of_is_said_again() -> None:
    workers = Workers(error=RuntimeError("not now"))

    async def go() -> None:
        collector = ReportCollector(workers)
        collector.abandon("gone")
        collector.start(every=0.01)
        await workers.are_asked(2)
        workers.error = None
        await workers.are_asked(len(workers.asked) + 1)
        # Once they have, nobody tells them again.
        asked = len(workers.asked)
        await asyncio.sleep(0.1)
        await collector.stop()
        assert len(workers.asked) <= asked + 1

    asyncio.run(go())
    assert workers.asked[0] == workers.asked[1] == {"gone": {}}


def test_the_background_rests_once_nothing_is_in_use() -> None:
    workers = Workers(in_use=0)

    async def go() -> None:
        collector = ReportCollector(workers)
        await collector.collect("a")
        collector.start(every=0.01)
        await asyncio.sleep(0.1)
        await collector.stop()

    asyncio.run(go())
    assert workers.asked == [{"a": {}}]


@pytest.mark.parametrize(("in_use", "several"), [(1, False), (0, True)])
def test_the_background_asks_while_there_can_be_something_new(in_use: int, several: bool) -> None:
    workers = Workers(in_use=in_use)

    async def go() -> None:
        collector = ReportCollector(workers, several_servers=several)
        await collector.collect("a")
        collector.start(every=0.01)
        await workers.are_asked(3)
        await collector.stop()

    asyncio.run(go())
    assert workers.asked[1:3] == [{}, {}]
