"""What kernels with a program a token share: the features of the token's slot, and which gates they open."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..buffers import BIAS, FLOOR, PARAMS, SCALE, SHIFT, THRESHOLD, PointBuffers

__all__ = ["features", "gates_open", "kernel_shape"]

# A kernel sees a global only as a constexpr.
_BIAS, _THRESHOLD, _SCALE, _SHIFT, _FLOOR = map(tl.constexpr, (BIAS, THRESHOLD, SCALE, SHIFT, FLOOR))
_PARAMS, _ALL_NAN = tl.constexpr(PARAMS), tl.constexpr(tl.PropagateNan.ALL)

# A tile of weights is 8 rows (few plans name more; further ones come in further chunks, which find x in the
# cache) by 128 columns a warp: eight loads of 16 bytes a thread, all in the same four columns, so that a
# sum over rows stays in the thread. 16 warps have 32 to 64 KiB in flight (ptxas spreads the loads a
# little); a multiprocessor's share of an H200's memory is 4.8 TB/s / 132 × 1 µs of latency = 36 KiB. At 64
# registers a thread, whatever K is, two programs share a multiprocessor: one reads while the other adds up,
# and 256 tokens run at once. Left alone, ptxas takes up to 108 for wide streams; held to 64, it keeps a few
# numbers on the stack.
_CHUNK = 8
_COLUMNS_PER_WARP = 128
_MOST_WARPS = 16
_MOST_REGISTERS = 64


def kernel_shape(buffers: PointBuffers, width: int) -> dict[str, int]:
    """The constants of a kernel whose programs have a token each."""
    rows = buffers.bit.shape[1]
    warps = min(_MOST_WARPS, triton.cdiv(triton.next_power_of_2(width), _COLUMNS_PER_WARP))
    shape = {
        "WIDTH": width,
        "ROWS": rows,
        "K": max(_CHUNK, triton.next_power_of_2(rows)),
        "CHUNK": _CHUNK,
        "BLOCK": warps * _COLUMNS_PER_WARP,
        "num_warps": warps,
    }
    # AMD's compiler does not know this option.
    return shape if torch.version.hip else shape | {"maxnreg": _MOST_REGISTERS}


@triton.jit
def features(
    own: tl.tensor,
    addend: tl.tensor,
    addend_at: tl.tensor,
    encoder: tl.tensor,
    params: tl.tensor,
    base: tl.tensor,
    n: tl.tensor,
    row: tl.tensor,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """[K] f of the `n` rows of a slot at one token. Args: base: the slot's first row, of all rows."""
    used = row < n
    p, rows = params + (base + row) * _PARAMS, encoder + base * WIDTH
    z = (row * 0).to(tl.float32)
    for first in range(0, n, CHUNK):
        i = first + tl.arange(0, CHUNK)
        dots = tl.zeros([CHUNK, BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < WIDTH
            x = tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
            if addend is not None:
                x += tl.load(addend + addend_at + at, mask=inside, other=0.0).to(tl.float32)
            weights = rows + i[:, None] * WIDTH + at[None, :]
            dots += tl.load(weights, mask=(i < n)[:, None] & inside[None, :], other=0.0) * x[None, :]
        z = _placed(tl.sum(dots, axis=1), first, z, row, CHUNK)
    z += tl.load(p + _BIAS, mask=used, other=0.0)
    value = tl.load(p + _SCALE, mask=used, other=0.0) * z + tl.load(p + _SHIFT, mask=used, other=0.0)
    value = tl.maximum(value, tl.load(p + _FLOOR, mask=used, other=0.0), propagate_nan=_ALL_NAN)
    return tl.where(z > tl.load(p + _THRESHOLD, mask=used, other=0.0), value, 0.0)


@triton.jit
def gates_open(
    above: tl.tensor,
    below: tl.tensor,
    f: tl.tensor,
    n: tl.tensor,
    row: tl.tensor,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """[K] whether above[k, j] < f[j] < below[k, j] for all j."""
    shut = row * 0
    for first in range(0, n, CHUNK):
        i = first + tl.arange(0, CHUNK)
        gate = i[:, None] * ROWS + row[None, :]
        read = (i < n)[:, None] & (row < n)[None, :]
        over = f[None, :] > tl.load(above + gate, mask=read, other=float("-inf"))
        under = f[None, :] < tl.load(below + gate, mask=read, other=float("inf"))
        shut = _placed(tl.sum((read & ~(over & under)).to(tl.int32), axis=1), first, shut, row, CHUNK)
    return shut == 0


@triton.jit
def _placed(
    chunk: tl.tensor, first: tl.tensor, whole: tl.tensor, row: tl.tensor, CHUNK: tl.constexpr
) -> tl.tensor:
    """`whole` [K] with the values of `chunk` [CHUNK] from row `first` on, a multiple of CHUNK."""
    return tl.where(row // CHUNK == first // CHUNK, tl.gather(chunk, row % CHUNK, axis=0), whole)
