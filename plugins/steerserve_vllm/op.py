"""The custom op that the layers call: opaque to torch.compile, one lookup and out when nothing is steered."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerserve.errors import IncompatibleError

if TYPE_CHECKING:
    from steerserve.runtime import Runtime
    from steerserve.training.capture import Capture

__all__ = ["bind", "steer_op", "watching"]


class _Bound:
    """What the op works on in this process: the runtime of the one engine whose model runs here."""

    owner: weakref.ReferenceType[Any] | None = None
    runtime: Runtime | None = None
    capture: Capture | None = None
    see: Callable[[int, Tensor, Tensor | None], None] | None = None


def bind(owner: Any, runtime: Runtime | None, capture: Capture | None = None) -> None:
    """Make the op serve this runner's steps.

    Raises: IncompatibleError if another steered engine still lives in this process.
    """
    alive = _Bound.owner() if _Bound.owner is not None else None
    if alive is not None and alive is not owner:
        raise IncompatibleError("expected one steered engine per process, another one is still alive here")
    _Bound.owner, _Bound.runtime, _Bound.capture = weakref.ref(owner), runtime, capture


@contextmanager
def watching(see: Callable[[int, Tensor, Tensor | None], None]) -> Iterator[None]:
    """Tell `see` of every call in this process: the hook point, and the two parts of the stream."""
    _Bound.see = see
    try:
        yield
    finally:
        _Bound.see = None


def _steer(stream: Tensor, addend: Tensor | None, point: int) -> None:
    if _Bound.see is not None:
        _Bound.see(point, stream, addend)
    if _Bound.runtime is not None:
        _Bound.runtime.steer(point, stream, addend)
    if _Bound.capture is not None:
        _Bound.capture.take(point, stream, addend)


def _steer_fake(stream: Tensor, addend: Tensor | None, point: int) -> None:
    return None


_library = torch.library.Library("steerserve", "FRAGMENT")
_library.define("steer(Tensor(a!) stream, Tensor? addend, int point) -> ()")
for _backend in ("CPU", "CUDA"):
    _library.impl("steer", _steer, _backend)
_library._register_fake("steer", _steer_fake)


def steer_op(stream: Tensor, addend: Tensor | None, point: int) -> None:
    """Edit the residual stream at a hook point in place.

    Args:
        stream: [tokens, d_model], changed; the part of the stream that the next layer adds to.
        addend: [tokens, d_model] or None; the stream is their sum.
        point: index of the hook point (see `steerserve.hookpoint`).
    """
    torch.ops.steerserve.steer(stream, addend, point)
