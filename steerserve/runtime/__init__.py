"""Steering inside a worker: from the requests of a step to what the op at the layer reads.

`HostRuntime` works in host memory with compiled loops, `DeviceRuntime` on an accelerator with Triton kernels
and no look back at the host; `open_runtime` picks one. Neither knows of vLLM.
"""

from __future__ import annotations

from .base import Runtime, open_runtime

__all__ = ["Runtime", "open_runtime"]
