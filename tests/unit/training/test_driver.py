"""What a process drives ends with it, however that process ends, and however it was started."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest

from steerserve_vllm.driver import driving, follow_driver, leave_with

# Only a process that does not end waits so long.
PATIENCE = 60.0


def engine_core(pipe: Connection, method: str, depth: int) -> None:
    """As vLLM's: starts a worker in the same way, and goes on for ever."""
    if method == "spawn":
        follow_driver()  # as loading the plugin does
    pipe.send(os.getpid())
    if depth:
        start(pipe, method, depth - 1)
    time.sleep(10 * PATIENCE)


def start(pipe: Connection, method: str, depth: int) -> None:
    context = multiprocessing.get_context(method)
    context.Process(target=engine_core, args=(pipe, method, depth), daemon=False).start()


def front_end(pipe: Connection, method: str) -> None:
    with driving():
        start(pipe, method, 1)
    assert "STEERSERVE_DRIVER" not in os.environ, "what is started later does not end with it"
    time.sleep(10 * PATIENCE)


def has_ended(handle: int) -> bool:
    ready, *_ = select.select([handle], [], [], PATIENCE)
    os.close(handle)
    return bool(ready)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_an_engine_and_its_workers_end_with_whoever_drives_them(method: str, number: int) -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    driver = multiprocessing.get_context("spawn").Process(target=front_end, args=(sender, method))
    driver.start()
    handles = []
    try:
        for _ in range(2):
            assert receiver.poll(PATIENCE), "an engine core and its worker"
            handles.append(os.pidfd_open(receiver.recv()))
    finally:
        assert driver.pid is not None
        os.kill(driver.pid, number)
        driver.join()
    assert [has_ended(handle) for handle in handles] == [True, True]


def in_a_process(work: Callable[[], None]) -> int:
    """The exit code of a forked process that does it, and ends with 0 if it can."""
    pid = os.fork()
    if pid == 0:
        work()
        time.sleep(0.2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_driver_that_has_gone_already_is_left_with_and_ones_own_pid_is_none() -> None:
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    assert in_a_process(lambda: leave_with(gone)) == 1
    assert in_a_process(lambda: leave_with(os.getpid())) == 0
