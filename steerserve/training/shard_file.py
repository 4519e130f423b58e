"""One shard of a harvest: a safetensors file of equally long columns and a header."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.files import FLOATS, inside, map_safetensors
from steerserve.sae.manifest import HookEntry, ModelEntry

__all__ = [
    "COLUMNS",
    "DTYPES",
    "INDEX",
    "Rows",
    "ShardHeader",
    "ShardPart",
    "open_shard",
    "shard_name",
    "whole_shards",
]

# Lists the shards of a complete harvest, and marks it as complete.
INDEX = "index.json"

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COLUMNS = ("tokens", "sequence", "position")

_LENGTH = 8  # bytes before a safetensors header, which say how long it is
_KINDS = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}


class ShardHeader(BaseModel):
    """What all shards of a folder have in common; stored in each, so that any prefix can be read."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: Literal[1] = 1
    d_in: Annotated[int, Field(gt=0)]
    dtype: Literal["bfloat16", "float32"]
    hook: HookEntry
    model: ModelEntry


class Rows(NamedTuple):
    """n harvested tokens: activations [n, d_in]; int32 [n] token ids, sequence numbers and positions."""

    activations: Tensor
    tokens: Tensor
    sequence: Tensor
    position: Tensor


class ShardPart:
    """A shard that is being written: activations go to the file as they come, none is kept in memory.

    Its file is hidden until `finish` has made it whole.

    Args: capacity: the most rows it will hold.
    Raises: OSError, as every method, if the file cannot be written.
    """

    def __init__(self, folder: Path, name: str, header: ShardHeader, capacity: int) -> None:
        self._path = folder / name
        self._part = folder / f".{name}.part"
        self._header = header
        self._columns = [torch.empty(capacity, dtype=torch.int32) for _ in COLUMNS]
        self.rows = 0
        # Room for the header of a full shard, which no shorter one exceeds.
        self._room = -(-len(self._described(capacity)) // 8) * 8
        self._file = self._part.open("wb", buffering=0)
        self._file.seek(_LENGTH + self._room)

    def append(self, rows: Rows) -> None:
        """Add rows, at most as many as there is still room for."""
        count = len(rows.tokens)
        self._write(_bytes(rows.activations.to(DTYPES[self._header.dtype])))
        for target, source in zip(self._columns, rows[1:], strict=True):
            target[self.rows : self.rows + count] = source
        self.rows += count

    def finish(self) -> None:
        """Write what is left; the shard appears under its name, whole, even if the machine stops here."""
        with self._file as file:
            for column in self._columns:
                self._write(_bytes(column[: self.rows]))
            file.seek(0)
            self._write(self._room.to_bytes(_LENGTH, "little") + self._described(self.rows).ljust(self._room))
            os.fsync(file.fileno())
        self._part.replace(self._path)

    def discard(self) -> None:
        """Give the disk back what an unfinished shard took of it."""
        self._file.close()
        self._part.unlink(missing_ok=True)

    def _described(self, rows: int) -> bytes:
        """The safetensors header of the columns, in the order in which they lie in the file."""
        activations = (DTYPES[self._header.dtype], [rows, self._header.d_in])
        columns = {"activations": activations} | dict.fromkeys(COLUMNS, (torch.int32, [rows]))
        entries: dict[str, object] = {"__metadata__": {"header": self._header.model_dump_json()}}
        at = 0
        for name, (dtype, shape) in columns.items():
            end = at + math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": _KINDS[dtype], "shape": shape, "data_offsets": [at, end]}
            at = end
        return json.dumps(entries).encode()

    def _write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]


def shard_name(number: int) -> str:
    """The file of shard `number`, counted from 0."""
    return f"shard-{number:05d}.safetensors"


def whole_shards(folder: Path) -> list[str]:
    """The names of the shards that a harvest has finished so far, in their order, up to the first gap."""
    names = map(shard_name, itertools.count())
    return list(itertools.takewhile(lambda name: (folder / name).exists(), names))


def open_shard(folder: Path, name: str) -> tuple[Rows, ShardHeader]:
    """The memory-mapped rows of one shard, and the header it carries.

    Raises: CheckpointError if the file is missing, damaged, or contradicts its header.
    """
    path = inside(folder, name)
    tensors, metadata = map_safetensors(path, (*FLOATS, torch.int32))
    try:
        header = ShardHeader.model_validate_json(metadata.get("header", ""))
        rows = Rows(**tensors)
    except (ValidationError, TypeError) as error:
        raise CheckpointError(f"expected an activation shard: {error}", path=path) from None
    count = rows.tokens.shape[0]
    if tuple(rows.activations.shape) != (count, header.d_in):
        message = f"expected shape [{count}, {header.d_in}], got {list(rows.activations.shape)}"
        raise CheckpointError(message, path=path, tensor="activations")
    return rows, header


def _bytes(values: Tensor) -> bytes | memoryview:
    """The memory of a CPU tensor, whatever its dtype (numpy has no bfloat16)."""
    return values.contiguous().view(torch.uint8).numpy().data.cast("B") if values.numel() else b""
