"""Residual-stream activations on disk: written once by the harvest, read in shuffled order by the trainer."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from steerserve.errors import CheckpointError, ConfigError
from steerserve.sae.files import inside, read_json, write_safetensors
from steerserve.sae.hook import Hook, parse_hook
from steerserve.sae.manifest import HookEntry, ModelEntry

from .shard_file import COLUMNS, DTYPES, Rows, ShardHeader, open_shard, shard_name
from .shuffle import shuffled_batches

__all__ = ["ShardReader", "ShardWriter"]

INDEX = "index.json"


@dataclass
class ShardWriter:
    """Appends harvested activations to `folder`, one safetensors file per `rows_per_shard` tokens.

    A shard appears under its name only when it is whole, so a crash loses at most the rows still in memory.
    `close` writes the last, shorter shard and `index.json`, which marks the harvest as complete.

    Args: hook: where the activations are read, or its name ("resid_post.3").
    Raises: ConfigError if the folder already holds a harvest, or `hook` names no residual stream.
    """

    folder: Path
    d_in: int
    hook: Hook | str
    model: str
    model_sha256: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rows_per_shard: int = 65_536

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if found := sorted(path.name for path in self.folder.glob("*.safetensors")):
            raise ConfigError(f"expected an empty folder for a new harvest, {self.folder} holds {found[0]}")
        hook = parse_hook(self.hook) if isinstance(self.hook, str) else self.hook
        if hook is None:
            raise ConfigError(f"expected a hook like resid_post.3, got {self.hook!r}")
        self._header = ShardHeader(
            d_in=self.d_in,
            dtype=self.dtype,
            hook=HookEntry(layer=hook.layer, site=hook.site),
            model=ModelEntry(name=self.model, sha256=self.model_sha256),
        )
        self._buffer = Rows(
            torch.empty(self.rows_per_shard, self.d_in, dtype=DTYPES[self.dtype]),
            *(torch.empty(self.rows_per_shard, dtype=torch.int32) for _ in COLUMNS),
        )
        self._filled = 0
        self._shards: list[dict[str, int | str]] = []

    def __len__(self) -> int:
        return sum(int(shard["rows"]) for shard in self._shards) + self._filled

    def append(self, activations: Tensor, tokens: Tensor, sequence: Tensor, position: Tensor) -> None:
        """Add n tokens, of any number of sequences in any order.

        Args:
            activations: [n, d_in], the raw residual stream, any float dtype and device.
            tokens, sequence, position: [n] integers: token id, number of the sequence, position in it.
        Raises: ConfigError if a shape does not fit or an activation is not finite; nothing is then kept.
        """
        rows = Rows(activations, tokens, sequence, position)
        count = activations.shape[0]
        if tuple(activations.shape) != (count, self.d_in):
            raise ConfigError(f"expected activations [n, {self.d_in}], got {list(activations.shape)}")
        for name, column in zip(COLUMNS, rows[1:], strict=True):
            if tuple(column.shape) != (count,):
                raise ConfigError(f"expected `{name}` of shape [{count}], got {list(column.shape)}")
        if not torch.isfinite(activations).all():
            raise ConfigError("expected finite activations, got NaN or infinity")
        done = 0
        while done < count:
            step = min(count - done, self.rows_per_shard - self._filled)
            for target, source in zip(self._buffer, rows, strict=True):
                target[self._filled : self._filled + step] = source[done : done + step]
            self._filled, done = self._filled + step, done + step
            if self._filled == self.rows_per_shard:
                self._flush()

    def close(self) -> None:
        """Write what is left, and `index.json`."""
        if self._filled:
            self._flush()
        index = {**self._header.model_dump(), "shards": self._shards, "rows": len(self)}
        part = self.folder / f".{INDEX}.{os.getpid()}"
        part.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        part.replace(self.folder / INDEX)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        # After a failure the harvest stays without an index: a readable prefix, not a complete one.
        if kind is None:
            self.close()

    def _flush(self) -> None:
        name = shard_name(len(self._shards))
        columns = {key: value[: self._filled] for key, value in self._buffer._asdict().items()}
        write_safetensors(self.folder / name, columns, {"header": self._header.model_dump_json()})
        self._shards.append({"file": name, "rows": self._filled})
        self._filled = 0


class ShardReader:
    """A harvest on disk, memory-mapped: whole ones, and the whole shards of one that was cut short.

    Raises: CheckpointError naming the file if a shard is truncated, missing, or belongs to another harvest.
    """

    header: ShardHeader
    complete: bool

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        names = self._listed()
        self._shards: list[Rows] = []
        self._starts = [0]
        for name in names:
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
                path = self.folder / shard_name(bisect_right(self._starts, start) - 1)
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
            if not isinstance(shards, list):
                raise CheckpointError("expected a list `shards`", path=path)
            names = [shard_name(number) for number in range(len(shards))]
        else:
            found = {path.name for path in self.folder.glob("shard-*.safetensors")}
            names = [shard_name(number) for number in range(len(found)) if shard_name(number) in found]
        if not names:
            raise CheckpointError("expected activation shards, found none", path=self.folder)
        return names
