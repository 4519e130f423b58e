"""The op on the CPU: one compiled loop over the steered tokens, no Python per token or row."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .buffers import BIAS, FLOOR, HI, LO, SCALE, SHIFT, THRESHOLD, A, C, PointBuffers

__all__ = ["steer_cpu"]

# Reassociation lets the dot products vectorise; infinities and NaN keep their meaning (open bounds, trace).
_FASTMATH = {"reassoc", "contract", "arcp", "nsz"}


def steer_cpu(
    stream: Tensor,
    addend: Tensor | None,
    buffers: PointBuffers,
    tokens: Tensor,
    token_slot: Tensor,
    token_rows: Tensor,
    trace: Tensor,
) -> None:
    """As `steer_reference`, for the steered tokens only.

    Args:
        stream: [all tokens, d], changed in place.
        addend: [all tokens, d] or None.
        tokens: [n] int64, the indices of the steered tokens, ascending.
        token_slot, token_rows: [n] int32 and int64, of those tokens.
        trace: [≥ n, K, 2] float32, row i belongs to tokens[i].
    """
    own = stream.index_select(0, tokens).float()
    x = own if addend is None else own + addend.index_select(0, tokens)
    delta = torch.zeros_like(own)
    _kernel(
        x.numpy(),
        delta.numpy(),
        buffers.encoder.numpy(),
        buffers.decoder.numpy(),
        buffers.params.numpy(),
        buffers.above.numpy(),
        buffers.below.numpy(),
        buffers.bit.numpy(),
        buffers.count.numpy(),
        token_slot.numpy(),
        token_rows.numpy(),
        trace.numpy(),
    )
    stream.index_copy_(0, tokens, own.add_(delta).to(stream.dtype))


_F32 = "float32[:, :, ::1]"
_SIGNATURE = (
    f"void(float32[:, ::1], float32[:, ::1], {_F32}, {_F32}, {_F32}, {_F32}, {_F32}, "
    "int32[:, ::1], int32[::1], int32[::1], int64[::1], float32[:, :, ::1])"
)


@numba.njit(_SIGNATURE, fastmath=_FASTMATH, nogil=True, cache=True, boundscheck=False)
def _kernel(
    x: Any,
    delta: Any,
    encoder: Any,
    decoder: Any,
    params: Any,
    above: Any,
    below: Any,
    bit: Any,
    count: Any,
    token_slot: Any,
    token_rows: Any,
    trace: Any,
) -> None:
    width = x.shape[1]
    f = np.empty(encoder.shape[1], dtype=np.float32)
    for t in range(x.shape[0]):
        trace[t, :, :] = np.nan
        slot = token_slot[t]
        n = count[slot] if slot >= 0 else 0
        if n == 0:
            continue
        for k in range(n):
            z = np.float32(0.0)
            for i in range(width):
                z += encoder[slot, k, i] * x[t, i]
            p = params[slot, k]
            z += p[BIAS]
            f[k] = max(p[SCALE] * z + p[SHIFT], p[FLOOR]) if z > p[THRESHOLD] else np.float32(0.0)
        for k in range(n):
            b = bit[slot, k]
            if b < 0 or ((token_rows[t] >> b) & 1) == 0:
                continue
            applies = True
            for j in range(n):
                if not (f[j] > above[slot, k, j] and f[j] < below[slot, k, j]):
                    applies = False
            if not applies:
                continue
            p = params[slot, k]
            edited = min(max(p[A] * f[k] + p[C], p[LO]), p[HI])
            trace[t, k, 0] = f[k]
            trace[t, k, 1] = edited
            step = edited - f[k]
            if step != 0.0:
                for i in range(width):
                    delta[t, i] += step * decoder[slot, k, i]
