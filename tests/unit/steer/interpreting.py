"""The GPU's kernels, run by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

import steerserve.steer.triton

__all__ = ["interpreted"]


@contextmanager
def interpreted() -> Iterator[ModuleType]:
    """The kernels' package, run by Triton's interpreter.

    Triton decides when a function is decorated. Here that may have happened already, so the package is loaded
    once more under another name, and the functions of Triton's own language are decorated again for a while.
    The interpreter, too, leaves changes in that language, which would break whoever compiles later.
    """
    changing = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
    before = [dict(vars(owner)) for owner in changing]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "interpret", True)
        patch.setattr(InterpreterBuilder, "cast_impl", _cast)
        patch.setattr(interpreter, "_patch_lang", _patching_once())
        patch.setattr(interpreter, "_get_np_dtype", _numpy_type)
        for module in (tl, tl.standard):
            for name, member in list(vars(module).items()):
                if isinstance(member, JITFunction):
                    setattr(module, name, _decorated(member.fn))
        try:
            yield _module()
        finally:
            for owner, members in zip(changing, before, strict=True):
                _restore(owner, members)


def _patching_once() -> Callable[[Any], Any]:
    """Patches Triton's language for the functions of a module once, and not at each of their calls.

    What it changes is taken back in the end, all at once.
    """
    done: set[int] = set()

    def patch_once(function: Any) -> Any:
        # What is patched depends on the names by which a module knows the language.
        if id(function.__globals__) not in done:
            done.add(id(function.__globals__))
            _PATCH(function)
        return _Kept

    return patch_once


_PATCH = interpreter._patch_lang


def _numpy_type(of: Any) -> Any:
    """As the interpreter's own, which makes a table of all types each time that it looks one up."""
    one = of.element_ty if isinstance(of, tl.block_type) else of
    return np.dtype(np.uint64) if isinstance(one, tl.pointer_type) else _scalar_type(one)


_scalar_type = cache(interpreter._get_np_dtype)


class _Kept:
    @staticmethod
    def restore() -> None:
        return None


@cache
def _decorated(function: Any) -> Any:
    return triton.jit(function)


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    """The interpreter cuts float32 to bfloat16; a GPU rounds to nearest, ties to even."""
    if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
        return _CAST(self, src, dst_type)
    rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
    return TensorHandle(rounded.view(torch.uint16).numpy(), dst_type.scalar)


_CAST = InterpreterBuilder.cast_impl


def _restore(owner: Any, members: dict[str, Any]) -> None:
    for name, member in list(vars(owner).items()):
        if member is not members.get(name, member):
            setattr(owner, name, members[name])
        # What a module gains are names that the interpreter's own copies of its functions go on using.
        elif name not in members and isinstance(owner, type):
            delattr(owner, name)


@cache
def _module() -> ModuleType:
    name, own = "steerserve.steer._interpreted", steerserve.steer.triton
    spec = importlib.util.spec_from_file_location(
        name, own.__file__, submodule_search_locations=list(own.__path__)
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
