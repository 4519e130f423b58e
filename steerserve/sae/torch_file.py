"""Tensors in a file of torch.save, memory-mapped: a pickle of names and shapes is all that is unpickled."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import CheckpointError

from .files import FLOATS

__all__ = ["map_torch"]

_INDEX_LIMIT = 2**20


def map_torch(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file that torch saved, as a view of the memory-mapped file.

    Raises: CheckpointError if the file is damaged, compressed, or holds anything but whole tensors of floats,
        by name; code in it never runs.
    """
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what the unpickler raises has no base of its own
        first = str(error).partition("\n")[0]
        message = f"expected tensors alone in a whole file (nothing else is unpickled): {first}"
        raise CheckpointError(message, path=path) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"expected tensors by name, got {type(content).__name__}", path=path)
    for name, tensor in content.items():
        _check_tensor(str(name), tensor, path)
    return {str(name): tensor.detach() for name, tensor in content.items()}


def _check_tensor(name: str, tensor: object, path: Path) -> None:
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"expected a tensor, got {type(tensor).__name__}", path=path, tensor=name)
    if tensor.dtype not in FLOATS:
        message = f"expected one of {list(map(str, FLOATS))}, got {tensor.dtype}"
        raise CheckpointError(message, path=path, tensor=name)
    # A view may claim a shape far beyond what the file holds.
    if tensor.layout is not torch.strided or not tensor.is_contiguous():
        raise CheckpointError("expected a contiguous tensor (save a clone)", path=path, tensor=name)


def _check_archive(path: Path) -> None:
    """Refuse, before torch reads it, a file that would unpack to more than its size or has a vast index."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(f"expected a whole file of torch.save: {error}", path=path) from None
    for item in members:
        if item.compress_type != zipfile.ZIP_STORED:
            message = "expected uncompressed tensors, which can be memory-mapped (save again with torch.save)"
            raise CheckpointError(message, path=path, tensor=item.filename)
        if item.filename.endswith("data.pkl") and item.file_size > _INDEX_LIMIT:
            message = f"expected an index of at most {_INDEX_LIMIT} bytes, got {item.file_size}"
            raise CheckpointError(message, path=path)
