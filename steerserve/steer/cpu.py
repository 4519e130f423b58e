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
    own = _bits(stream)
    other = own[:0] if addend is None and own is not None else _bits(addend)
    if own is None or other is None or own.dtype != other.dtype:
        gathered = stream.index_select(0, tokens).float()
        extra = None if addend is None else addend.index_select(0, tokens).float()
        everything = torch.arange(len(tokens))
        steer_cpu(gathered, extra, buffers, everything, token_slot, token_rows, trace)
        stream.index_copy_(0, tokens, gathered.to(stream.dtype))
        return
    _kernel(
        own,
        other,
        tokens.numpy(),
        token_slot.numpy(),
        token_rows.numpy(),
        *buffers.views,
        trace.numpy(),
    )


def _bits(part: Tensor | None) -> Any:
    """What the kernel reads without a copy: float32, or the bits of bfloat16; None for other tensors."""
    if part is None or not part.is_contiguous():
        return None
    if part.dtype is torch.float32:
        return part.detach().numpy()
    return part.view(torch.uint16).numpy() if part.dtype is torch.bfloat16 else None


_F32 = "float32[:, :, ::1]"


def _signature(element: str) -> str:
    return (
        f"void({element}[:, ::1], {element}[:, ::1], int64[::1], int32[::1], int64[::1], "
        f"{_F32}, {_F32}, {_F32}, {_F32}, {_F32}, int32[:, ::1], int32[::1], "
        "boolean[:, ::1], float32[:, :, ::1])"
    )


@numba.njit(inline="always")
def _round(bits: Any) -> Any:
    """float32 bits to bfloat16 bits: to nearest, ties to even."""
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@numba.njit(
    [_signature("float32"), _signature("uint16")],
    fastmath=_FASTMATH,
    nogil=True,
    cache=True,
    boundscheck=False,
)
def _kernel(
    stream: Any,
    addend: Any,
    tokens: Any,
    token_slot: Any,
    token_rows: Any,
    encoder: Any,
    decoder: Any,
    params: Any,
    above: Any,
    below: Any,
    bit: Any,
    count: Any,
    gated: Any,
    trace: Any,
) -> None:
    width = stream.shape[1]
    f = np.empty(encoder.shape[1], dtype=np.float32)
    own = np.empty(width, dtype=np.float32)
    x = np.empty(width, dtype=np.float32)
    delta = np.empty(width, dtype=np.float32)
    other = np.empty(width, dtype=np.float32)
    own_bits, other_bits = own.view(np.uint32), other.view(np.uint32)
    two_parts = addend.shape[0] > 0
    for t in range(tokens.shape[0]):
        trace[t, :, :] = np.nan
        slot = token_slot[t]
        n = count[slot] if slot >= 0 else 0
        if n == 0:
            continue
        at = tokens[t]
        if stream.itemsize == 2:
            for i in range(width):
                own_bits[i] = np.uint32(stream[at, i]) << np.uint32(16)
            if two_parts:
                for i in range(width):
                    other_bits[i] = np.uint32(addend[at, i]) << np.uint32(16)
        else:
            for i in range(width):
                own[i] = stream[at, i]
            if two_parts:
                for i in range(width):
                    other[i] = addend[at, i]
        if two_parts:
            for i in range(width):
                x[i] = own[i] + other[i]
        else:
            for i in range(width):
                x[i] = own[i]
        finite = True
        for k in range(n):
            z = np.float32(0.0)
            for i in range(width):
                z += encoder[slot, k, i] * x[i]
            p = params[slot, k]
            z += p[BIAS]
            f[k] = max(p[SCALE] * z + p[SHIFT], p[FLOOR]) if z > p[THRESHOLD] else np.float32(0.0)
            finite = finite and -np.inf < f[k] < np.inf
        changed = False
        for k in range(n):
            b = bit[slot, k]
            if b < 0 or ((token_rows[t] >> b) & 1) == 0:
                continue
            applies = finite
            if gated[slot, k]:
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
                if changed:
                    for i in range(width):
                        delta[i] += step * decoder[slot, k, i]
                else:
                    for i in range(width):
                        delta[i] = step * decoder[slot, k, i]
                    changed = True
        if not changed:
            continue
        for i in range(width):
            own[i] += delta[i]
        if stream.itemsize == 2:
            for i in range(width):
                stream[at, i] = _round(own_bits[i])
        else:
            for i in range(width):
                stream[at, i] = own[i]
