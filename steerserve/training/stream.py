"""A harvest read while it is being written: bounded memory, bounded disk, every row used once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import ConfigError
from steerserve.sae.hook import Hook

from .shard_file import Rows, ShardHeader, open_shard, shard_name

__all__ = ["LeftError", "ShardStream"]

_POLL_SECONDS = 0.05
_POOL_BYTES = 256 * 2**20


class LeftError(Exception):
    """Raised in the thread that writes, when the reader wants no more."""


class ShardStream:
    """Stands where a `ShardReader` does while another thread writes its shards; one reader, one epoch.

    The writer waits (in `hold_back`) while it is `ahead` rows before what was asked for, and a shard is
    deleted when all of its rows have been given out. The order of the batches is decided by the rows and the
    seed, never by who was faster.

    Args:
        folder: where a `ShardWriter` writes.
        rows: how many it will have written in the end; the last ones may be kept for evaluation.
        ahead: rows that may wait on disk, beside those of the pool.
    """

    def __init__(self, folder: Path, rows: int, ahead: int) -> None:
        self.folder = folder
        self._rows = rows
        self._ahead = ahead
        self._wanted = ahead
        self._starts = [0]
        self._deleted = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._ended = self._left = False
        self._header: ShardHeader | None = None

    def __len__(self) -> int:
        return self._rows

    @property
    def header(self) -> ShardHeader:
        """What all shards have in common; waits for the first."""
        if self._header is None:
            self._wait_for(1)
            self._header = open_shard(self.folder, shard_name(0))[1]
        return self._header

    @property
    def d_in(self) -> int:
        """Width of the residual stream."""
        return self.header.d_in

    @property
    def hook(self) -> Hook:
        """Where the activations are read."""
        return Hook(self.header.hook.layer, self.header.hook.site)

    def activations(self, start: int, stop: int) -> Tensor:
        """[stop − start, d_in] as stored: rows that no batch has gone beyond; waits until they are there.

        Raises: ConfigError if the harvest ends before them or they are no longer there.
        """
        return torch.cat([piece.activations for piece in self._pieces(start, stop)])

    def shuffled_batches(
        self, batch_size: int, seed: int, epochs: int, *, rows: int | None = None, skip: int = 0
    ) -> Iterator[Tensor]:
        """Batches of the first `rows` rows (all by default), once each; an incomplete last one is left out.

        A pool of 256 MiB is shuffled, half of it given out, and filled up again: a row stays for a random
        number of rounds. Of several such iterators, only one may go beyond its first pool.

        Args: skip: batches to leave out at the start, as for `shuffle.shuffled_batches`.
        Returns: an iterator of [batch_size, d_in] tensors in the dtype of the shards.
        Raises: ConfigError for more than one epoch: what was read is gone.
        """
        if epochs > 1:
            raise ConfigError(
                f"expected one epoch of a stream, got {epochs}: ask for no more tokens than it brings"
            )
        wanted = self._rows if rows is None else rows
        size = max(2 * batch_size, _POOL_BYTES // (4 * self.d_in))
        for number, batch in enumerate(self._pooled(batch_size, seed, wanted, size)):
            if number >= skip:
                yield batch

    def hold_back(self) -> None:
        """Called by the writer now and then: returns when more rows are wanted.

        Raises: LeftError when the reader wants no more at all.
        """
        with self._changed:
            while not self._left and self._whole_rows() >= self._wanted:
                self._changed.wait(_POLL_SECONDS)
            if self._left:
                raise LeftError

    def end(self, error: BaseException | None = None) -> None:
        """Called by the writer when it has written all, or failed."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def leave(self) -> None:
        """Called by the reader when it wants no more."""
        with self._changed:
            self._left = True
            self._changed.notify_all()

    def _pooled(self, batch_size: int, seed: int, rows: int, size: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        read = min(size, rows)
        pool = self.activations(0, read)
        while len(pool) >= batch_size:
            pool = pool[torch.randperm(len(pool), generator=generator)]
            share = len(pool) if read == rows else len(pool) // 2
            given = share // batch_size * batch_size
            yield from torch.split(pool[:given], batch_size)
            # Only now: an iterator that is dropped within its first pool has taken nothing from another.
            self._delete_before(read)
            stop = min(rows, read + given)
            fresh = [self.activations(read, stop)] if stop > read else []
            pool, read = torch.cat([pool[given:], *fresh]), stop

    def _pieces(self, start: int, stop: int) -> Iterator[Rows]:
        shard = 0
        while start < stop:
            self._ask_for(start + 1, stop)
            while self._starts[shard + 1] <= start:
                shard += 1
            if shard < self._deleted:
                raise ConfigError(
                    f"expected rows from {self._starts[self._deleted]} on, got {start}: it is gone"
                )
            rows = open_shard(self.folder, shard_name(shard))[0]
            offset, end = start - self._starts[shard], min(stop, self._starts[shard + 1])
            yield Rows(*(column[offset : end - self._starts[shard]] for column in rows))
            start = end

    def _ask_for(self, least: int, wanted: int) -> None:
        """Let the writer go on to `wanted` rows, and wait until there are `least`."""
        with self._changed:
            self._wanted = max(self._wanted, wanted + self._ahead)
            self._changed.notify_all()
        self._wait_for(least)

    def _wait_for(self, rows: int) -> None:
        with self._changed:
            while self._whole_rows() < rows:
                if self._error is not None:
                    raise self._error
                # Looked for once more after the end: the last shard may have come just before it.
                if self._ended and self._whole_rows() < rows:
                    raise ConfigError(
                        f"expected {self._rows:,} activations, the texts gave {self._whole_rows():,}"
                    )
                self._changed.wait(_POLL_SECONDS)

    def _whole_rows(self) -> int:
        """Rows of all shards that have been whole so far."""
        while (self.folder / (name := shard_name(len(self._starts) - 1))).exists():
            self._starts.append(self._starts[-1] + len(open_shard(self.folder, name)[0].tokens))
        return self._starts[-1]

    def _delete_before(self, row: int) -> None:
        """Give the disk back the shards that end at `row` or before it."""
        while self._deleted + 1 < len(self._starts) and self._starts[self._deleted + 1] <= row:
            (self.folder / shard_name(self._deleted)).unlink()
            self._deleted += 1
