"""Writing a harvest: activations go to disk as they come, shards appear when they are whole."""

from __future__ import annotations

import fcntl
import json
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from steerserve.errors import CheckpointError, ConfigError
from steerserve.sae.hook import Hook, parse_hook
from steerserve.sae.manifest import HookEntry, ModelEntry

from .shard_file import COLUMNS, INDEX, Rows, ShardHeader, ShardPart, open_shard, shard_name, whole_shards

__all__ = ["ShardWriter"]

_ROWS_CHECKED_AT_ONCE = 2048


@dataclass
class ShardWriter:
    """Appends harvested activations to `folder`, one safetensors file per `rows_per_shard` tokens.

    A shard appears under its name only when it is whole, so a crash loses at most the rows of the last one.
    `close` writes that one, shorter, and `index.json`, which marks the harvest as complete.

    Args:
        hook: where the activations are read, or its name ("resid_post.3").
        resume: go on behind the whole shards of a harvest that was cut short.
    Raises: ConfigError if the folder already holds a harvest (with `resume`: another one than this), another
        process writes there, or `hook` names no residual stream.
    """

    folder: Path
    d_in: int
    hook: Hook | str
    model: str
    model_sha256: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rows_per_shard: int = 65_536
    resume: bool = False

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        found = whole_shards(self.folder)
        if found and not self.resume:
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
        self._release = _lock(self, self.folder)
        self._stored = [self._of_this_harvest(name) for name in found]
        self._sizes = [len(rows.tokens) for rows in self._stored]
        self._part: ShardPart | None = None

    def __len__(self) -> int:
        return sum(self._sizes) + (self._part.rows if self._part is not None else 0)

    def append(self, activations: Tensor, tokens: Tensor, sequence: Tensor, position: Tensor) -> None:
        """Add n tokens, of any number of sequences in any order.

        Args:
            activations: [n, d_in], the raw residual stream, any float dtype, in host memory.
            tokens, sequence, position: [n] integers: token id, number of the sequence, position in it.
        Raises: ConfigError if a shape does not fit or an activation is not finite; nothing is then kept.
            CheckpointError if the disk is full; whole shards are then kept.
        """
        rows = Rows(activations, tokens, sequence, position)
        self._check(rows)
        done, count = 0, len(tokens)
        with self._keeping_whole_shards():
            while done < count:
                if self._part is None:
                    name = shard_name(len(self._sizes))
                    self._part = ShardPart(self.folder, name, self._header, self.rows_per_shard)
                step = min(count - done, self.rows_per_shard - self._part.rows)
                self._part.append(Rows(*(column[done : done + step] for column in rows)))
                done += step
                if self._part.rows == self.rows_per_shard:
                    self._finish(self._part)

    def stored(self, start: int, tokens: Tensor, sequence: Tensor, position: Tensor) -> int:
        """How many of the rows from row `start` on are on disk already, from the harvest that is resumed.

        Args: tokens, sequence, position: [n], as for `append`.
        Raises: ConfigError if other rows are stored in their place: the input is not what it was.
        """
        before, count = 0, 0
        for rows, size in zip(self._stored, self._sizes, strict=False):
            low, high = max(start, before), min(start + len(tokens), before + size)
            if low < high:
                wanted = (column[low - start : high - start] for column in (tokens, sequence, position))
                held = (column[low - before : high - before] for column in rows[1:])
                if not all(torch.equal(a.int(), b) for a, b in zip(wanted, held, strict=True)):
                    raise ConfigError(
                        f"expected the harvest in {self.folder} to be of the same texts, cut to the same "
                        f"length; rows {low} to {high} hold other tokens (harvest to a new folder)"
                    )
                count += high - low
            before += size
        return count

    def close(self) -> None:
        """Write what is left, and `index.json`."""
        with self._keeping_whole_shards():
            if self._part is not None:
                self._finish(self._part)
            shards = [{"file": shard_name(number), "rows": size} for number, size in enumerate(self._sizes)]
            index = {**self._header.model_dump(), "shards": shards, "rows": len(self)}
            part = self.folder / f".{INDEX}.part"
            part.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
            part.replace(self.folder / INDEX)
        self._release()

    def abandon(self) -> None:
        """Stop without a last shard and without an index: a readable prefix, which can be resumed."""
        if self._part is not None:
            self._part.discard()
        self._part = None
        self._release()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _check(self, rows: Rows) -> None:
        count = len(rows.activations)
        if tuple(rows.activations.shape) != (count, self.d_in):
            raise ConfigError(f"expected activations [n, {self.d_in}], got {list(rows.activations.shape)}")
        for name, column in zip(COLUMNS, rows[1:], strict=True):
            if tuple(column.shape) != (count,):
                raise ConfigError(f"expected `{name}` of shape [{count}], got {list(column.shape)}")
        parts = rows.activations.split(_ROWS_CHECKED_AT_ONCE)
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise ConfigError("expected finite activations, got NaN or infinity")

    def _of_this_harvest(self, name: str) -> Rows:
        rows, header = open_shard(self.folder, name)
        if header != self._header:
            raise ConfigError(
                f"expected {self.folder} to hold a harvest of {self._header.model_dump_json()}, "
                f"got {header.model_dump_json()}"
            )
        return rows

    def _finish(self, part: ShardPart) -> None:
        part.finish()
        self._sizes.append(part.rows)
        self._part = None

    @contextmanager
    def _keeping_whole_shards(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abandon()
            raise CheckpointError(
                f"expected to write activations: {os.strerror(error.errno or 0)}; the {sum(self._sizes):,} "
                "of whole shards stay, and the same harvest started again goes on behind them",
                path=self.folder,
            ) from error


def _lock(owner: object, folder: Path) -> Callable[[], object]:
    """Keep other writers out while `owner` lives; the kernel drops the lock with the process that dies.

    Returns: what gives it back before that. Raises: ConfigError if another one writes there.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    release = weakref.finalize(owner, os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        release()
        raise ConfigError(f"expected no other harvest to be writing to {folder}, one is") from None
    return release
