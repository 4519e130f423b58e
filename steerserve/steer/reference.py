"""The op in plain torch: the oracle that every kernel is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from .buffers import BIAS, FLOOR, HI, LO, SCALE, SHIFT, THRESHOLD, A, C, PointBuffers

__all__ = ["steer_reference"]


def steer_reference(
    stream: Tensor,
    addend: Tensor | None,
    buffers: PointBuffers,
    token_slot: Tensor,
    token_rows: Tensor,
    trace: Tensor,
) -> None:
    """Edit the residual stream in place: x' = x + Σ_rows g·(f' − f)·d.

    Args:
        stream: [tokens, d], changed in place; where `addend` is given, the part of x that the next layer
        adds to.
        addend: [tokens, d] or None; the true residual stream is x = stream + addend.
        buffers: the rows of every slot.
        token_slot: [tokens] int32; −1 leaves the token untouched, bit for bit.
        token_rows: [tokens] int64; bit b set where the row with bit b applies.
        trace: [tokens, K, 2] float32, filled with f and f' of rows that applied, NaN elsewhere.
    Source: DESIGN, "The maths": one clipped affine map on a feature's activation.
    """
    trace.fill_(torch.nan)
    for t in range(stream.shape[0]):
        slot = int(token_slot[t])
        if slot < 0:
            continue
        n = int(buffers.count[slot])
        if n == 0:
            continue
        x = stream[t].float() + (0 if addend is None else addend[t].float())
        p = buffers.params[slot, :n]
        z = buffers.encoder[slot, :n] @ x + p[:, BIAS]
        value = torch.maximum(p[:, SCALE] * z + p[:, SHIFT], p[:, FLOOR])
        f = torch.where(z > p[:, THRESHOLD], value, torch.zeros_like(value))
        edited = torch.clamp(p[:, A] * f + p[:, C], p[:, LO], p[:, HI])

        bit = buffers.bit[slot, :n].long()
        listed = (bit >= 0) & ((token_rows[t] >> bit.clamp(min=0)) & 1).bool()
        above, below = buffers.above[slot, :n, :n], buffers.below[slot, :n, :n]
        applies = listed & ((f > above) & (f < below)).all(dim=1)
        if not applies.any():
            continue
        delta = torch.where(applies, edited - f, torch.zeros_like(f)) @ buffers.decoder[slot, :n]
        stream[t] = (stream[t].float() + delta).to(stream.dtype)
        trace[t, :n, 0] = torch.where(applies, f, torch.nan)
        trace[t, :n, 1] = torch.where(applies, edited, torch.nan)
