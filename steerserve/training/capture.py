"""Harvesting inside a worker: the residual stream at hook points, as steering would see it, to shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import IncompatibleError
from ..sae.hook import Hook
from .part import WHOLE, Part
from .shard_file import DTYPES
from .shard_writer import ShardWriter

__all__ = ["Capture"]

Ints = NDArray[Any]
_ROWS_ADDED_AT_ONCE = 1024


@dataclass(frozen=True)
class _Batch:
    """The sequences that are being run, flattened; a row is a token that is kept.

    Attributes:
        request: the number of the first sequence's request.
        starts, ends: [sequences] where each begins and ends among all tokens.
        tokens: their ids. row: the row of each token, −1 where it is special.
        labels: [rows] each: token id, sequence, position.
        start: rows of all batches before this one.
    """

    request: int
    starts: Ints
    ends: Ints
    tokens: Ints
    row: Ints
    labels: tuple[Tensor, Tensor, Tensor]
    start: int

    def __len__(self) -> int:
        return len(self.labels[0])


class Capture:
    """Appends the stream of every ordinary token to the shards of each hook point; special ones are left out.

    A batch of sequences is announced, vLLM runs it in whatever order and pieces it likes (a preempted one
    twice), and then its rows are appended in the order of sequences and positions: what is written never
    depends on the scheduler. Memory is bounded by the buffers that `open` allocates.

    Args:
        hooks: the name of each hook point, by its index.
        special_tokens: ids whose activations are outliers that an SAE is not trained on.
    """

    def __init__(self, hooks: Mapping[int, Hook], special_tokens: frozenset[int]) -> None:
        self.hooks = hooks
        self._special = np.array(sorted(special_tokens), dtype=np.int64)
        self._writers: Mapping[int, ShardWriter] = {}
        self._buffers: dict[int, Tensor] = {}
        self._seen: dict[int, Ints] = {}
        self._batch: _Batch | None = None
        self._chosen: tuple[Tensor, Tensor] | None = None
        self._rows = 0
        self._part = WHOLE

    def open(self, writers: Mapping[int, ShardWriter], capacity: int, part: Part = WHOLE) -> None:
        """Begin a harvest.

        Args:
            writers: one for each hook point.
            capacity: rows of a batch, unless one sequence has more.
            part: which sequences of a larger harvest these are.
        """
        self._writers, self._rows, self._part = writers, 0, part
        self._allocate(capacity)

    def begin_batch(self, request: int, sequence: int, lengths: Sequence[int], tokens: bytes) -> bool:
        """Announce the sequences that come next.

        Args:
            request, sequence: numbers of the first one; the others count on.
            lengths: tokens of each. tokens: the ids of all, int32, one after the other.
        Returns: whether they must be run; False if a harvest that is resumed has all their rows.
        Raises: ConfigError if that harvest holds other rows in their place.
        """
        ends = np.cumsum(lengths)
        starts = ends - lengths
        ids = np.frombuffer(tokens, dtype=np.int32)
        position = np.arange(len(ids)) - np.repeat(starts, lengths)
        own = np.arange(sequence, sequence + len(starts))
        number = np.repeat(own * self._part.of + self._part.number, lengths)
        kept = ~np.isin(ids, self._special)
        row = np.where(kept, np.cumsum(kept) - 1, -1)
        first, second, third = (torch.from_numpy(c[kept].astype(np.int32)) for c in (ids, number, position))
        labels = (first, second, third)
        self._batch = _Batch(request, starts, ends, ids, row, labels, self._rows)
        self._rows += len(first)
        if any(len(buffer) < len(first) for buffer in self._buffers.values()):
            self._allocate(len(first))
        for seen in self._seen.values():
            seen[:] = False
        held = [writer.stored(self._batch.start, *labels) for writer in self._writers.values()]
        if all(count == len(first) for count in held):
            self._batch = None
        return self._batch is not None

    def begin_step(
        self, request_ids: list[str], scheduled: Ints, computed: Ints, token_ids: NDArray[Any]
    ) -> None:
        """Choose the tokens of the coming step; see `Runtime.begin_step` for the arguments.

        Raises: IncompatibleError if they are not the announced ones.
        """
        batch = self._batch
        if batch is None:
            return
        number = np.array([int(name.split("-", 1)[0]) for name in request_ids]) - batch.request
        first = batch.starts[number] + computed
        place = np.repeat(first - np.cumsum(scheduled) + scheduled, scheduled) + np.arange(scheduled.sum())
        # A sampled token may be scheduled before it is known that the request wants no more.
        prompt = np.flatnonzero(place < np.repeat(batch.ends[number], scheduled))
        place = place[prompt]
        if not np.array_equal(token_ids[prompt], batch.tokens[place]):
            raise IncompatibleError("expected vLLM to run the sequences it was given, it runs other tokens")
        row = batch.row[place]
        kept = np.flatnonzero(row >= 0)
        self._chosen = (torch.from_numpy(prompt[kept]), torch.from_numpy(row[kept]))

    def take(self, point: int, stream: Tensor, addend: Tensor | None) -> None:
        """Called by the op at every hook point: keep the chosen tokens of those that are harvested."""
        if self._chosen is None or point not in self._buffers:
            return
        buffer = self._buffers[point]
        # In pieces: the sum is taken in float32, which for a long step would be the largest buffer of all.
        for taken, rows in zip(*(part.split(_ROWS_ADDED_AT_ONCE) for part in self._chosen), strict=True):
            here = taken.to(stream.device)
            values = stream.index_select(0, here).float()
            if addend is not None:
                values += addend.index_select(0, here)
            buffer.index_copy_(0, rows, values.to(buffer.dtype).cpu())
            self._seen[point][rows.numpy()] = True

    def end_step(self) -> None:
        """The forward pass is over."""
        self._chosen = None

    def end_batch(self) -> None:
        """Append the batch's rows to the shards, but for those that they hold already.

        Raises: ConfigError if an activation is not finite; CheckpointError if the disk is full;
            IncompatibleError if vLLM left a token out.
        """
        batch, self._batch = self._batch, None
        if batch is None:
            return
        count = len(batch)
        for point, writer in self._writers.items():
            done = writer.stored(batch.start, *batch.labels)
            if missing := count - int(self._seen[point][:count].sum()):
                raise IncompatibleError(f"expected vLLM to run {count} tokens, it left out {missing}")
            if done < count:
                writer.append(self._buffers[point][done:count], *(column[done:] for column in batch.labels))

    def close(self) -> int:
        """Write what is left and the indices; returns how many activations there are at all hook points."""
        for writer in self._writers.values():
            writer.close()
        count = sum(map(len, self._writers.values()))
        self._forget()
        return count

    def abandon(self) -> None:
        """Stop where the shards are; what is whole can be read, and resumed."""
        for writer in self._writers.values():
            writer.abandon()
        self._forget()

    def _allocate(self, capacity: int) -> None:
        self._buffers = {}
        self._buffers = {
            point: torch.empty(capacity, writer.d_in, dtype=DTYPES[writer.dtype])
            for point, writer in self._writers.items()
        }
        self._seen = {point: np.zeros(capacity, dtype=bool) for point in self._writers}

    def _forget(self) -> None:
        self._writers, self._buffers, self._seen = {}, {}, {}
        self._batch = self._chosen = None
