"""Compiling without holding up the event loop: a plan may have to read thousands of places of a disk."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

__all__ = ["run"]

P = ParamSpec("P")
T = TypeVar("T")
# Threads of their own: one client's cold features shall not take those in which vLLM and the audit log wait.
_THREADS = 4


async def run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function returns or raises, which is called in a thread."""
    bound = functools.partial(function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_pool(), bound)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="steerserve-compile")
