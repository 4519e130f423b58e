"""A run's checkpoint: one safetensors file, replaced whole, that knows which run it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import ConfigError
from steerserve.sae.files import map_safetensors, write_safetensors

__all__ = ["done_steps", "load_state", "save_state"]

_KINDS = (torch.float32, torch.float64, torch.int64)


def save_state(path: Path, tensors: Mapping[str, Tensor], identity: str) -> None:
    """Replace the checkpoint; a run killed at any moment leaves the old one or the new one.

    Args: identity: settings and data of the run, compared when it is read.
    """
    write_safetensors(path, tensors, {"identity": identity})


def load_state(path: Path, identity: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint.

    Raises: CheckpointError if the file is damaged; ConfigError if it belongs to other settings or other data.
    """
    tensors, metadata = map_safetensors(path, _KINDS)
    if metadata.get("identity") != identity:
        message = f"expected a checkpoint of this run, {path} is of other settings or data"
        raise ConfigError(f"{message}: remove it, or train into another folder")
    return tensors


def done_steps(path: Path) -> int:
    """The steps made by the run of a checkpoint; 0 where there is none.

    Raises: CheckpointError if the file is damaged.
    """
    return int(map_safetensors(path, _KINDS)[0]["0.numbers"][0]) if path.exists() else 0
