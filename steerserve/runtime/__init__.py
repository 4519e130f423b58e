"""Steering inside a worker: from the requests of a step to what the op at the layer reads.

`host.HostRuntime` works in host memory with compiled loops, `device.DeviceRuntime` on an accelerator with
Triton kernels and no look back at the host. They are told of a step in different ways, so that a model runner
opens the one that it drives, whatever device that runs on. Neither knows of vLLM.
"""

from __future__ import annotations

from .base import Runtime

__all__ = ["Runtime"]
