"""On PYTHONPATH, lets every process of vLLM run Triton kernels on the CPU, in Triton's interpreter.

vLLM's V2 model runner asks for Triton, and the CPU build of vLLM for a Triton backend named "cpu". This
registers one before vLLM is imported; the interpreter never asks it to compile anything. For tests only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"


class _AfterImport(MetaPathFinder):
    """Changes a module of Triton as soon as it is imported, and not before: most processes never do."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        change = _CHANGES.get(name)
        if change is None:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _then(change, spec.loader)  # type: ignore[method-assign]
        return spec


def _then(change: Callable[[Any], None], loader: Loader) -> Any:
    execute = loader.exec_module

    def exec_module(module: Any) -> None:
        execute(module)
        change(module)

    return exec_module


def _register(backends: Any) -> None:
    backends.backends["cpu"] = backends.Backend(compiler=backends.BaseBackend, driver=_Driver)


def _quicken(interpreter: Any) -> None:
    """Patch Triton's language once for good instead of at every call, and check no sum for overflow."""
    patch, scopes = interpreter._patch_lang, {}

    class Kept:
        @staticmethod
        def restore() -> None:
            return None

    def patch_once(function: Any) -> Any:
        # What is patched depends on the names by which a module knows the language.
        if id(function.__globals__) not in scopes:
            scopes[id(function.__globals__)] = (patch(function), function.__globals__)
        return Kept

    interpreter._patch_lang = patch_once
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


class _Driver:
    """Says that the CPU is there; nothing else is ever asked of it."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", 0, 1)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        return None


_CHANGES = {"triton.backends": _register, "triton.runtime.interpreter": _quicken}
sys.meta_path.insert(0, _AfterImport())
