"""Residual-stream activations on disk: written once by the harvest, read in shuffled order by the trainer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.files import inside, read_json
from steerserve.sae.hook import Hook

from .shard_file import INDEX, Rows, ShardHeader, open_shard, whole_shards
from .shard_writer import ShardWriter
from .shuffle import shuffled_batches

__all__ = ["ShardReader", "ShardWriter"]


class ShardReader:
    """A harvest on disk, memory-mapped: whole ones, and the whole shards of one that was cut short.

    Raises: CheckpointError naming the file if a shard is truncated, missing, or belongs to another harvest.
    """

    header: ShardHeader
    complete: bool

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._names = self._listed()
        self._shards: list[Rows] = []
        self._starts = [0]
        for name in self._names:
            rows, header = open_shard(self.folder, name)
            if self._shards and header != self.header:
                raise CheckpointError("expected a shard of the same harvest", path=self.folder / name)
            self.header = header
            self._shards.append(rows)
            self._starts.append(self._starts[-1] + len(rows.tokens))

    @property
    def d_in(self) -> int:
        """Width of the residual stream."""
        return self.header.d_in

    @property
    def hook(self) -> Hook:
        """Where the activations were read."""
        return Hook(self.header.hook.layer, self.header.hook.site)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, window: slice) -> Rows:
        """Rows `window` (step 1) in the order of the harvest, copied out of the mapped files."""
        start, stop, step = window.indices(len(self))
        if step != 1:
            raise ValueError(f"expected a slice of step 1, got {step}")
        pieces = list(self._pieces(start, max(start, stop)))
        if not pieces:
            return Rows(*(column[:0].clone() for column in self._shards[0]))
        return Rows(*(torch.cat(columns) for columns in zip(*pieces, strict=True)))

    def activations(self, start: int, stop: int) -> Tensor:
        """[stop − start, d_in] as stored, checked to be finite.

        Raises: CheckpointError naming the shard that holds a NaN or an infinity.
        """
        pieces: list[Tensor] = []
        for piece in self._pieces(start, stop):
            # A NaN or infinity always spoils the sum; finite rows cannot overflow it in float64.
            if not torch.isfinite(piece.activations.sum(dtype=torch.float64)):
                path = self.folder / self._names[bisect_right(self._starts, start) - 1]
                raise CheckpointError("expected finite activations, got NaN or infinity", path=path)
            pieces.append(piece.activations)
            start += len(piece.activations)
        return torch.cat(pieces)

    def shuffled_batches(
        self, batch_size: int, seed: int, epochs: int, *, rows: int | None = None, skip: int = 0
    ) -> Iterator[Tensor]:
        """Shuffled [batch_size, d_in] batches of the first `rows` rows (all by default): see `shuffle.py`."""
        wanted = len(self) if rows is None else rows
        return shuffled_batches(self, wanted, batch_size, seed=seed, epochs=epochs, skip=skip)

    def _pieces(self, start: int, stop: int) -> Iterator[Rows]:
        while start < stop:
            shard = bisect_right(self._starts, start) - 1
            offset = start - self._starts[shard]
            count = min(stop, self._starts[shard + 1]) - start
            yield Rows(*(column[offset : offset + count] for column in self._shards[shard]))
            start += count

    def _listed(self) -> list[str]:
        if not self.folder.is_dir():
            raise CheckpointError("expected a folder of activation shards, found none", path=self.folder)
        self.complete = (self.folder / INDEX).exists()
        if self.complete:
            path = inside(self.folder, INDEX)
            shards = read_json(path).get("shards")
            if not isinstance(shards, list) or not all(_names_a_file(shard) for shard in shards):
                raise CheckpointError("expected a list `shards` of objects with a string `file`", path=path)
            names = [shard["file"] for shard in shards]
        else:
            names = whole_shards(self.folder)
        if not names:
            raise CheckpointError("expected activation shards, found none", path=self.folder)
        return names


def _names_a_file(shard: object) -> bool:
    return isinstance(shard, dict) and isinstance(shard.get("file"), str)
