"""Tensors in a file of torch.save, memory-mapped: a pickle of names and shapes is all that is unpickled."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from steerserve.errors import CheckpointError

from .files import FLOATS

__all__ = ["TorchFile", "map_torch", "read_torch"]

_INDEX_LIMIT = 2**20
_NAMES_LIMIT = 16_384
_DEPTH_LIMIT = 8
_LOCAL_HEADER = 30
_STORAGE = re.compile(r"(?:^|/)data/\d+$")
# A trainer's own state, as large as twice the weights; nothing here ever uses it.
_SKIPPED = {"optimizer"}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class TorchFile:
    """What a file of torch.save holds. The names of nested dictionaries are joined by dots.

    Attributes:
        path: the file.
        tensors: of floats, as views of the mapped file; plain or transposed, never any other view.
        values: strings, numbers and None; tensors of a single integer as that integer, longer ones of
            integers as they are.
    """

    path: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def under(self, prefix: str) -> TorchFile:
        """What lies in the dictionary `prefix`, by the names it has there."""
        start = f"{prefix}."
        tensors = {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}
        values = {k.removeprefix(start): v for k, v in self.values.items() if k.startswith(start)}
        return TorchFile(self.path, tensors, values)


def map_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of `read_torch` alone."""
    return read_torch(path).tensors


def read_torch(path: Path) -> TorchFile:
    """Everything in a file that torch saved, its tensors as views of the memory-mapped file.

    Raises: CheckpointError if the file is damaged, compressed, or holds anything but whole tensors, strings
        and numbers, by name; code in it never runs.
    """
    records = _records(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what the unpickler raises has no base of its own
        first = str(error).partition("\n")[0]
        message = f"expected tensors alone in a whole file (nothing else is unpickled): {first}"
        raise CheckpointError(message, path=path) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"expected tensors by name, got {type(content).__name__}", path=path)
    file = TorchFile(path)
    named = {k: v for k, v in content.items() if k not in _SKIPPED}
    for number, (name, value) in enumerate(_flattened(named, path)):
        # A dictionary that is shared is named again wherever it stands: few of them name billions.
        if number == _NAMES_LIMIT:
            raise CheckpointError(f"expected names at most {_NAMES_LIMIT} in number", path=path)
        if isinstance(value, Tensor) and value.is_floating_point():
            file.tensors[name] = _checked_floats(name, value, path)
        else:
            file.values[name] = _checked_value(name, value, path)
    _check_storages({**file.values, **file.tensors}, records, path)
    return file


def _flattened(content: dict[Any, Any], path: Path, depth: int = 1) -> Iterator[tuple[str, Any]]:
    if depth > _DEPTH_LIMIT:
        raise CheckpointError(f"expected names at most {_DEPTH_LIMIT} deep", path=path)
    for key, value in content.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", part) for name, part in _flattened(value, path, depth + 1))
        else:
            yield str(key), value


def _checked_floats(name: str, tensor: Tensor, path: Path) -> Tensor:
    if tensor.dtype not in FLOATS:
        message = f"expected one of {list(map(str, FLOATS))}, got {tensor.dtype}"
        raise CheckpointError(message, path=path, tensor=name)
    if not _is_whole(tensor):
        message = "expected a contiguous tensor, plain or transposed (save a clone)"
        raise CheckpointError(message, path=path, tensor=name)
    return tensor.detach()


def _checked_value(name: str, value: object, path: Path) -> object:
    if isinstance(value, Tensor):
        if value.dtype not in _INTEGERS or not _is_whole(value):
            message = f"expected a contiguous tensor of floats or integers, got {value.dtype}"
            raise CheckpointError(message, path=path, tensor=name)
        return value.item() if value.numel() == 1 else value
    if isinstance(value, list | tuple):
        return list(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise CheckpointError(f"expected a tensor, got {type(value).__name__}", path=path, tensor=name)


def _is_whole(tensor: Tensor) -> bool:
    """Whether each value of the tensor is one of the file: a view may claim a shape far beyond it."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    # Weights that were initialised as each other's transpose are saved so.
    return tensor.is_contiguous() or (tensor.ndim == 2 and tensor.T.is_contiguous())


def _check_storages(content: dict[str, Any], records: set[tuple[int, int]], path: Path) -> None:
    """Compare what each tensor views to the archive's records: torch takes the index's word for their sizes.

    Where in memory the file begins is not known, but it is where all storages are records.
    """
    parts = [part for part in content.values() if isinstance(part, Tensor) and part.numel() > 0]
    views = sorted({(part.untyped_storage().data_ptr(), part.untyped_storage().nbytes()) for part in parts})
    if not views:
        return
    begins = (views[0][0] - offset for offset, _ in records)
    whole = any(all((start - begin, size) in records for start, size in views) for begin in begins)
    if not whole or any(start + size > after for (start, size), (after, _) in pairwise(views)):
        message = (
            "expected tensors of the sizes that the archive's records have, each with a record of its own"
        )
        raise CheckpointError(message, path=path)


def _records(path: Path) -> set[tuple[int, int]]:
    """The first byte and the length of each storage's record in the archive.

    Raises: CheckpointError, before torch reads it, for a file that would unpack to more than its size, or has
        a vast index.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = archive.infolist()
            storages = [item for item in members if _STORAGE.search(item.filename)]
            places = {(_first_byte(file, item), item.file_size) for item in storages}
    except Exception as error:  # what zipfile raises has no base of its own
        raise CheckpointError(f"expected a whole file of torch.save: {error}", path=path) from None
    for item in members:
        if item.compress_type != zipfile.ZIP_STORED:
            message = "expected uncompressed tensors, which can be memory-mapped (save again with torch.save)"
            raise CheckpointError(message, path=path, tensor=item.filename)
        if item.filename.endswith("data.pkl") and item.file_size > _INDEX_LIMIT:
            message = f"expected an index of at most {_INDEX_LIMIT} bytes, got {item.file_size}"
            raise CheckpointError(message, path=path)
    return places


def _first_byte(file: IO[bytes], item: zipfile.ZipInfo) -> int:
    file.seek(item.header_offset)
    header = file.read(_LOCAL_HEADER)
    name, extra = struct.unpack("<HH", header[-4:])
    return item.header_offset + len(header) + int(name) + int(extra)
