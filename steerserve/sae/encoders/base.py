"""What every encoder of a resident SAE is, and how weights get from a mapped file to the device."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Encoder", "copied_matrix", "copied_vector"]

_COPIED_AT_ONCE = 2**22


class Encoder(Protocol):
    """The map from tokens to the activations of every feature."""

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations to encode one token, counting products with weights alone."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything it holds, by name."""

    def to(self, device: torch.device | str) -> Encoder:
        """A float32 copy on a device."""

    def encode(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Args: y: [n, d] float32, what the SAE encodes (normalised, less its pre-bias). x: [n, d] float32,
            the stream itself.

        Returns: f [n, F] float32, NaN where y is; and what the decoder weighs each token by, [n], or None.
        """


def copied_matrix(matrix: Tensor, device: torch.device | str, row_scale: Tensor | None = None) -> Tensor:
    """[F, d] float32 on the device, in the memory order of the mapped file, which is read in that order.

    Args: row_scale: [F] float64, multiplied in before rounding.
    """
    out = torch.empty_like(matrix, dtype=torch.float32, device=device)
    major = 0 if matrix.stride(0) >= matrix.stride(1) else 1
    rows, length = matrix.shape[major], max(1, _COPIED_AT_ONCE // matrix.shape[1 - major])
    for start in range(0, rows, length):
        size = min(length, rows - start)
        part = matrix.narrow(major, start, size)
        if row_scale is not None:
            scale = row_scale.narrow(0, start, size) if major == 0 else row_scale
            part = part.double() * scale.unsqueeze(1)
        out.narrow(major, start, size).copy_(part)
    return out


def copied_vector(part: Tensor, device: torch.device | str) -> Tensor:
    """A float32 copy on the device, of its own even where `part` is there already."""
    return part.to(device, torch.float32, copy=True)
