"""Shuffled batches out of shards, in bounded memory and an order that only the seed decides."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Source", "shuffled_batches"]

_BLOCK = 2048
_LEAST_BLOCK = 64
_BLOCKS_PER_WINDOW = 128
_WINDOW_BYTES = 256 * 2**20


class Source(Protocol):
    """Where batches come from: a ShardReader."""

    @property
    def d_in(self) -> int:
        """Width of a row."""

    def activations(self, start: int, stop: int) -> Tensor:
        """[stop − start, d_in] rows as stored."""


def shuffled_batches(
    source: Source, rows: int, batch_size: int, *, seed: int, epochs: int, skip: int = 0
) -> Iterator[Tensor]:
    """Batches of the first `rows` rows, reshuffled each epoch; an incomplete last batch is left out.

    Blocks of neighbouring rows are drawn in random order into a window of at most 256 MiB, which is then
    shuffled row by row: reads stay sequential, and a batch mixes sequences from the whole harvest. A window
    holds at least 128 blocks, of 2,048 rows where rows are short and of no less than 64.

    Args:
        source: the shards. rows: how many of their rows to use. batch_size: rows per batch.
        seed: decides the order alone. epochs: how often to go through. skip: batches to leave out at the
            start; the rest is what a run without `skip` would yield.
    Returns: an iterator of [batch_size, d_in] tensors in the dtype of the shards.
    """
    done, skip = divmod(skip, max(1, rows // batch_size))
    for epoch in range(done, epochs):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        yield from islice(_epoch(source, rows, batch_size, generator), skip, None)
        skip = 0


def _epoch(source: Source, rows: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    # Sized in float32, whatever is stored, so that the order does not depend on the dtype.
    window_rows = _WINDOW_BYTES // (4 * source.d_in)
    block = min(_BLOCK, max(_LEAST_BLOCK, window_rows // _BLOCKS_PER_WINDOW))
    blocks = torch.randperm(-(-rows // block), generator=generator).tolist()
    per_window = max(1, window_rows // block)
    left: list[Tensor] = []
    for first in range(0, len(blocks), per_window):
        spans = [(place * block, (place + 1) * block) for place in blocks[first : first + per_window]]
        window = torch.cat([source.activations(start, min(rows, stop)) for start, stop in spans])
        # Rows that did not fill a batch of the last window open this one.
        mixed = torch.cat([*left, window[torch.randperm(len(window), generator=generator)]])
        whole = len(mixed) // batch_size * batch_size
        yield from torch.split(mixed[:whole], batch_size)
        left = [mixed[whole:].clone()]
