"""The dense products of a training step, in float32, by the faster of the two libraries that torch brings.

On the CPU torch multiplies by MKL, which gives processors that are not Intel's half of their vector width. oneDNN,
which torch brings too and uses for bfloat16, gives them all of it: `python -m benchmarks.products`.
"""

from __future__ import annotations

import platform
from functools import cache

import torch
from torch import Tensor

__all__ = ["linear_into", "mixed", "weighed"]

# Results are made in parts of 16 MiB: the C library then uses the same pages again, where larger ones are new
# at every call, and clearing them costs as much as the product.
_PART = 2**22


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weightᵀ + bias, written into `out`.

    Args: out: [B, F] float32. x: [B, d]. weight: [F, d]. bias: [F].
    Returns: out.
    """
    if not _by_onednn(x):
        return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)
    size = max(1, _PART // len(weight))
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        out[part].copy_(_linear(x[part], weight, bias))
    return out


def mixed(values: Tensor, rows: Tensor) -> Tensor:
    """values @ rows: each line of values is a mixture of rows. Args: values: [B, F]. rows: [F, d]."""
    return _linear(values, rows.T) if _by_onednn(values) else values @ rows


def weighed(values: Tensor, inputs: Tensor) -> Tensor:
    """valuesᵀ @ inputs: for each feature, the inputs weighed by it. Args: values: [B, F]. inputs: [B, d]."""
    if not _by_onednn(values):
        return values.T @ inputs
    return _linear(inputs.T.contiguous(), values.T).T.contiguous()


def _by_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and _onednn()


@cache
def _onednn() -> bool:
    """Whether torch has the product and the processor is one on which it was measured."""
    known = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    return known and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weightᵀ + bias by oneDNN, which takes transposed views as they are."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
