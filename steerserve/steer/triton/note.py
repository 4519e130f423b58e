"""The first stage on a GPU: which conditions hold is noted, for later hook points and later tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..buffers import ABORT, ASKED, LATCH, PLAIN, PointBuffers
from ..history import History
from .features import features, gates_open, kernel_shape

__all__ = ["note_triton"]

# No argument of a kernel may be called `params`: Triton's own launcher has a variable of that name.
_PLAIN, _LATCH, _ABORT, _ASKED = map(tl.constexpr, (PLAIN, LATCH, ABORT, ASKED))


def note_triton(
    stream: Tensor,
    addend: Tensor | None,
    buffers: PointBuffers,
    token_slot: Tensor,
    token_rows: Tensor,
    history: History,
) -> None:
    """As `note_reference`; of several tokens of a request the first one counts."""
    tokens, width = stream.shape
    _note[(tokens,)](
        stream,
        addend,
        stream.stride(0),
        0 if addend is None else addend.stride(0),
        token_slot,
        token_rows,
        buffers.encoder,
        buffers.params,
        buffers.above,
        buffers.below,
        buffers.bit,
        buffers.row,
        buffers.state,
        buffers.condition,
        buffers.count,
        buffers.stateful,
        history.table,
        history.position,
        history.since,
        NOTES=history.since.shape[1],
        **kernel_shape(buffers, width),
    )


@triton.jit
def _note(
    stream: tl.tensor,
    addend: tl.tensor,
    stream_stride: tl.tensor,
    addend_stride: tl.tensor,
    token_slot: tl.tensor,
    token_rows: tl.tensor,
    encoder: tl.tensor,
    formulas: tl.tensor,
    above: tl.tensor,
    below: tl.tensor,
    bit: tl.tensor,
    number: tl.tensor,
    state: tl.tensor,
    condition: tl.tensor,
    count: tl.tensor,
    stateful: tl.tensor,
    table: tl.tensor,
    position: tl.tensor,
    since: tl.tensor,
    NOTES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slot + token).to(tl.int64)
    if slot < 0:
        return
    if tl.load(stateful + slot) == 0:
        return
    n = tl.load(count + slot)
    base = slot * ROWS
    row = tl.arange(0, K)
    used = row < n
    own = stream + token * stream_stride
    f = features(own, addend, token * addend_stride, encoder, formulas, base, n, row, WIDTH, CHUNK, BLOCK)
    what = tl.load(state + base + row, mask=used, other=_PLAIN)
    infinite = used & ~((f > float("-inf")) & (f < float("inf")))
    holds = gates_open(above + base * ROWS, below + base * ROWS, f, n, row, ROWS, CHUNK)
    holds = holds & (tl.sum(infinite.to(tl.int32), axis=0) == 0)

    mask = tl.load(token_rows + token)
    b = tl.maximum(tl.load(bit + base + row, mask=used, other=0), 0).to(tl.int64)
    c = tl.maximum(tl.load(condition + base + row, mask=used, other=0), 0).to(tl.int64)
    one = (row * 0 + 1).to(tl.int64)
    # No two rows ask under the same bit.
    shut = tl.sum(tl.where((what == _ASKED) & ~holds, one << b, 0), axis=0)
    mask = mask & ~shut
    tl.store(token_rows + token, mask)
    listed = ((mask >> b) & (mask >> c) & 1) != 0
    request = tl.load(table + token)
    if request >= 0:
        first = ((what == _LATCH) | (what == _ABORT)) & listed & holds
        at = since + request.to(tl.int64) * NOTES + tl.load(number + base + row, mask=used, other=0)
        here = (row * 0).to(tl.int64) + tl.load(position + token)
        tl.atomic_min(at, here, mask=first, sem="relaxed")
