"""One shard of a harvest: a safetensors file of equally long columns and a header."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.files import FLOATS, inside, map_safetensors
from steerserve.sae.manifest import HookEntry, ModelEntry

__all__ = ["COLUMNS", "DTYPES", "Rows", "ShardHeader", "open_shard", "shard_name"]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COLUMNS = ("tokens", "sequence", "position")


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


def shard_name(number: int) -> str:
    """The file of shard `number`, counted from 0."""
    return f"shard-{number:05d}.safetensors"


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
