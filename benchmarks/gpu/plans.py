"""Plans with random rows, laid into the op's buffers as if an SAE had given them."""

from __future__ import annotations

import torch

from steerserve.steer.buffers import PointBuffers

__all__ = ["copied", "random_plans", "vary"]

_INF = torch.inf
# threshold, scale, shift, floor: relu, jumprelu, gated, the identity of a direction.
_ACTIVATIONS = [(0.0, 1.0, 0.0, 0.0), (0.4, 1.0, 0.0, 0.0), (0.1, 1.7, -0.3, 0.0), (-_INF, 1.0, 0.0, -_INF)]
# a, c, lo, hi: clamp, ablate, scale, add, at_least, at_most.
_EDITS = [
    (0.0, 3.0, -_INF, _INF),
    (0.0, 0.0, -_INF, _INF),
    (-1.5, 0.0, -_INF, _INF),
    (1.0, 2.0, -_INF, _INF),
    (1.0, 0.0, 1.0, _INF),
    (1.0, 0.0, -_INF, 0.2),
]


def random_plans(slots: int, rows: int, width: int, device: torch.device | str) -> PointBuffers:
    """One plan in every slot, of `rows` clamped features: each of them moves every token."""
    buffers = PointBuffers(slots, rows, width, device)
    generator = torch.Generator(device).manual_seed(0)
    buffers.encoder.normal_(std=width**-0.5, generator=generator)
    buffers.decoder.normal_(std=width**-0.5, generator=generator)
    buffers.params[..., :9] = torch.tensor((0.0, *_ACTIVATIONS[0], *_EDITS[0]), device=device)
    buffers.above.fill_(-_INF)
    buffers.below.fill_(_INF)
    # A token's mask has 64 bits; rows beyond share them.
    buffers.bit[:] = torch.arange(rows, device=device) % 64
    buffers.row[:] = torch.arange(rows, device=device)
    buffers.count.fill_(rows)
    return buffers


def vary(buffers: PointBuffers) -> None:
    """Every activation, every op, conditions, a row that only they read, and a last slot that is empty."""
    slots, rows = buffers.bit.shape
    for slot in range(slots):
        for k in range(rows):
            kind = (0.1, *_ACTIVATIONS[(slot + k) % 4], *_EDITS[(slot + k) % 6])
            buffers.params[slot, k, :9] = torch.tensor(kind)
            if k % 3 == 2:
                buffers.gated[slot, k] = True
                buffers.above[slot, k, (k + 1) % rows] = -0.5
                buffers.below[slot, k, (k + 2) % rows] = 1.0
        buffers.count[slot] = max(1, rows - slot)
    buffers.bit[:, rows // 2] = -1 if rows > 3 else rows // 2
    buffers.count[-1] = 0


def copied(buffers: PointBuffers, device: torch.device | str) -> PointBuffers:
    """The same rows on another device."""
    slots, rows = buffers.bit.shape
    copy = PointBuffers(slots, rows, buffers.encoder.shape[2], device)
    for name, part in vars(buffers).items():
        if isinstance(part, torch.Tensor):
            getattr(copy, name).copy_(part)
    return copy
