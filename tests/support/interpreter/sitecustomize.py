"""On PYTHONPATH, lets every process of vLLM run Triton kernels on the CPU, in Triton's interpreter.

vLLM's V2 model runner asks for Triton, and the CPU build of vLLM for a Triton backend named "cpu". This
registers one before vLLM is imported; the interpreter never asks it to compile anything. For tests only.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"


class _Registering(MetaPathFinder):
    """Adds the backend as soon as `triton.backends` is imported, and not before: most processes never do."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "triton.backends":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _then_register(spec.loader)  # type: ignore[method-assign]
        return spec


def _then_register(loader: Loader) -> Any:
    execute = loader.exec_module

    def exec_module(module: Any) -> None:
        execute(module)
        module.backends["cpu"] = module.Backend(compiler=module.BaseBackend, driver=_Driver)

    return exec_module


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


sys.meta_path.insert(0, _Registering())
