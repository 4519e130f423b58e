"""Something costly that runs, until something else is asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any, TypeVar

__all__ = ["OneAtATime"]

T = TypeVar("T")


class OneAtATime:
    """Holds what was started last, by its key."""

    def __init__(self) -> None:
        self._stack, self._key, self._value = ExitStack(), "", None

    def get(self, key: str, start: Callable[[], AbstractContextManager[T]]) -> T:
        """What runs under this key; where something else does, it is ended first."""
        value: Any = self._value
        if key != self._key:
            self.stop()
            value = self._value = self._stack.enter_context(start())
            self._key = key
        return value

    def stop(self) -> None:
        """End what runs."""
        self._key, self._value = "", None
        self._stack.close()

    def __enter__(self) -> OneAtATime:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self.stop()
