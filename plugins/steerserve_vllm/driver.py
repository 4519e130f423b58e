"""An engine's processes end with the process that drives them, even if that one is killed.

vLLM's workers notice that their engine core has gone; the engine core does not notice that its front end has.
It would go on to hold memory and devices, and the folder that a harvest is resumed in.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["driving", "follow_driver", "leave_with"]

_DRIVER = "STEERSERVE_DRIVER"


@contextmanager
def driving() -> Iterator[None]:
    """What is started in here through multiprocessing, and by those processes in turn, ends with this one.

    Forked processes learn it as they begin; spawned ones as they load this plugin (`follow_driver`).
    """
    _follow_after_fork()
    before = os.environ.get(_DRIVER)
    os.environ[_DRIVER] = str(os.getpid())
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DRIVER]
        else:
            os.environ[_DRIVER] = before


def follow_driver() -> None:
    """Leave with the process that drives this one, if one said so."""
    driver = os.environ.get(_DRIVER)
    if driver is not None:
        leave_with(int(driver))


def leave_with(driver: int) -> None:
    """End this process as soon as another one has ended. Args: driver: its pid; one's own changes nothing."""
    if driver != os.getpid():
        _watch(os.getpid(), driver)


@cache
def _follow_after_fork() -> None:
    os.register_at_fork(after_in_child=follow_driver)


@cache
def _watch(own: int, driver: int) -> None:
    """Args: own: the pid of this process, for a fork inherits the cache and not the thread."""
    try:
        descriptor = os.pidfd_open(driver)
    except ProcessLookupError:
        os._exit(1)

    def wait() -> None:
        select.select([descriptor], [], [])
        os._exit(1)

    threading.Thread(target=wait, name="steerserve-driver", daemon=True).start()
