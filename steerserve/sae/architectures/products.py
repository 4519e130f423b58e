"""The dense products of a training step, by the faster of the two libraries that torch brings.

On the CPU torch multiplies float32 by MKL. oneDNN, which torch brings too, was up to twice as fast on the one
processor that was measured, an AMD EPYC with AVX-512: `python -m benchmarks.products`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

__all__ = ["Parts", "linear", "mixed", "weighed"]

# Results are made in parts of 16 MiB: the C library then uses the same pages again, where larger ones are new
# at every call, and clearing them costs as much as the product. What reads a part finds it in the cache.
_PART = 2**22


@dataclass(frozen=True)
class Parts:
    """A [B, F] float32 matrix that is made some rows at a time, as often as it is gone through.

    Attributes:
        shape: (B, F). device: where it is made.
        make: yields (rows, their part of the matrix), in order; a part belongs to whoever takes it.
    """

    shape: tuple[int, int]
    device: torch.device
    make: Callable[[], Iterator[tuple[slice, Tensor]]]

    @classmethod
    def of(cls, matrix: Tensor) -> Parts:
        """A matrix that is there, as one part. Args: matrix: [B, F], contiguous."""
        rows, columns = matrix.shape
        return cls((rows, columns), matrix.device, lambda: iter([(slice(0, rows), matrix)]))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        return self.make()

    def into(self, out: Tensor) -> Tensor:
        """The whole matrix, written into `out` [B, F] and returned."""
        for rows, part in self:
            out[rows].copy_(part)
        return out


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, precision: torch.dtype = torch.float32
) -> Parts:
    """x @ weightᵀ + bias. Args: x: [B, d]. weight: [F, d]. bias: [F]. precision: what is multiplied."""
    features = len(weight)
    size = max(1, _PART // features) if x.device.type == "cpu" else len(x)

    def make() -> Iterator[tuple[slice, Tensor]]:
        own = weight.to(precision)
        for start in range(0, len(x), size):
            rows = slice(start, min(start + size, len(x)))
            yield rows, _linear(x[rows].to(precision), own, bias)

    return Parts((len(x), features), x.device, make)


def mixed(values: Tensor, rows: Tensor) -> Tensor:
    """values @ rows: each line of values mixes rows. Args: values: [B, F]. rows: [F, d]."""
    return _linear(values, rows.T)


def weighed(values: Tensor, inputs: Tensor, out: Tensor) -> Tensor:
    """valuesᵀ @ inputs, written into `out`: for each feature, the inputs weighed by it.

    Args: values: [B, F]. inputs: [B, d]. out: [F, d].
    """
    if _by_onednn(values):
        return out.copy_(_linear(inputs.T.contiguous(), values.T).T)
    return torch.mm(values.T, inputs, out=out)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weightᵀ + bias, float32. oneDNN takes transposed views as they are."""
    product: Tensor
    if _by_onednn(x):
        product = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    if x.dtype == torch.float32:
        return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
    product = (x @ weight.T).float()
    return product if bias is None else product.add_(bias)


def _by_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and _onednn()


@cache
def _onednn() -> bool:
    """Whether torch has the product, on x86: elsewhere it was never measured."""
    known = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    return known and hasattr(torch.ops.mkldnn, "_linear_pointwise")
