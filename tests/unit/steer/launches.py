"""What a runtime launches, seen at the kernels: the arguments, and what a GPU would compile for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import triton

# Triton imports it when it first looks at an argument, which fails while its language is interpreted.
import triton.experimental.gluon
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

__all__ = ["KERNELS", "Launch", "Launches", "watched"]

KERNELS = ("note", "steer", "hold", "fill", "count")


@dataclass(frozen=True)
class Launch:
    """One launch as a CUDA graph would record it: kernel, grid, arguments, constants and options."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def recorded(self) -> tuple[Any, ...]:
        """As numbers: a tensor is its address."""
        numbers = (part.data_ptr() if isinstance(part, Tensor) else part for part in self.arguments)
        return self.kernel, self.grid, tuple(numbers), tuple(sorted(self.options.items()))


@dataclass
class Launches:
    """What was launched, and what a GPU would have had to compile for it, in order."""

    seen: list[Launch] = field(default_factory=list)
    compiled: list[tuple[str, str]] = field(default_factory=list)
    kernels: dict[str, Any] = field(default_factory=dict)

    def replay(self, launches: list[Launch]) -> None:
        """Run what was recorded, with the arguments that it had then; nothing is added to `seen`."""
        for launch in launches:
            self.kernels[launch.kernel][launch.grid](*launch.arguments, **launch.options)


class _Watched:
    """Stands for a kernel of the package: notes each launch, and hands it on to `run`, if there is one."""

    def __init__(self, name: str, real: JITFunction[Any], launches: Launches) -> None:
        # A kernel of its own, which has compiled nothing yet.
        self.name, self.real, self.launches = name, JITFunction(real.fn), launches
        self.keys: set[str] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.launches.seen.append(Launch(self.name, grid, arguments, options))
            self._compile(arguments, options)
            if (run := self.launches.kernels.get(self.name)) is not None:
                run[grid](*arguments, **options)

        return launch

    def _compile(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Let Triton itself say whether this launch would be compiled anew, for an H200."""
        if any(isinstance(part, Tensor) and part.is_meta for part in arguments):
            return

        def instead(*, key: str, **more: Any) -> bool:
            if key not in self.keys:
                self.keys.add(key)
                self.launches.compiled.append((self.name, key))
            # Says that it was seen to.
            return True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton.knobs.runtime, "interpret", False)
            patch.setattr(triton.runtime.driver, "_active", _H200)
            patch.setattr(triton.knobs.runtime, "jit_cache_hook", instead)
            self.real.run(*arguments, grid=(1,), warmup=True, **options)


class _H200:
    """What Triton asks of a driver before it compiles."""

    @staticmethod
    def get_current_target() -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 0


@contextmanager
def watched(interpreted: ModuleType | None = None) -> Iterator[Launches]:
    """Watch every launch of the package's kernels.

    Args: interpreted: the package as `interpreting.interpreted` gives it, which does what is launched.
    """
    launches = Launches()
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            module = importlib.import_module(f"steerserve.steer.triton.{name}")
            if interpreted is not None:
                own = importlib.import_module(f"{interpreted.__name__}.{name}")
                launches.kernels[name] = getattr(own, f"_{name}")
            patch.setattr(module, f"_{name}", _Watched(name, getattr(module, f"_{name}"), launches))
        yield launches
