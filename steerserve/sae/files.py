"""Tensors on disk, memory-mapped and distrusted: no byte of a weight is read before its header is checked."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steerserve.errors import CheckpointError

__all__ = [
    "FLOATS",
    "check_finite",
    "inside",
    "map_npz",
    "map_safetensors",
    "read_json",
    "sha256_of",
    "take",
    "write_safetensors",
]

_JSON_LIMIT = 64 * 2**20
_SCAN_CHUNK = 2**20
_LOCAL_HEADER = 30
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def inside(folder: Path, name: str) -> Path:
    """The real path of `folder/name`, which must be a plain file that lies within `folder`.

    Raises: CheckpointError if it is missing, no regular file, or a symlink that leads out of the folder.
    """
    path = folder / name
    real = path.resolve()
    if not real.is_relative_to(folder.resolve()):
        message = "expected a file inside its folder, got a link that leads out of it (copy the file instead)"
        raise CheckpointError(message, path=path)
    if not real.is_file():
        raise CheckpointError("expected a regular file, found none", path=path)
    return real


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 64 MiB.

    Raises: CheckpointError if it is larger, unreadable, or not an object.
    """
    if (size := path.stat().st_size) > _JSON_LIMIT:
        raise CheckpointError(f"expected at most {_JSON_LIMIT} bytes of JSON, got {size}", path=path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"expected valid JSON: {error}", path=path) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"expected a JSON object, got {type(value).__name__}", path=path)
    return value


def map_safetensors(
    path: Path, dtypes: Collection[torch.dtype] = FLOATS
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file as a view of the memory-mapped file, and the file's metadata.

    The library checks header, offsets and length, and maps rather than reads: pages come in as rows are used.

    Raises: CheckpointError if the file is truncated, malformed, or holds numbers of a kind not in `dtypes`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"expected a whole safetensors file: {error}", path=path) from None
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes:
            raise CheckpointError(
                f"expected one of {list(map(str, dtypes))}, got {tensor.dtype}", path=path, tensor=name
            )
    return tensors, metadata


def map_npz(path: Path) -> dict[str, Tensor]:
    """Every array of an uncompressed npz file as a view of the memory-mapped file.

    numpy.load cannot map inside an archive, so the arrays' offsets are taken from the zip directory.

    Raises: CheckpointError if the archive is damaged or compressed, or an array holds anything but floats
        (object arrays are pickles and are never read).
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = [item for item in archive.infolist() if item.filename.endswith(".npy")]
            return {item.filename[:-4]: _map_member(path, file, item) for item in members}
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"expected a whole npz archive: {error}", path=path) from None


def _map_member(path: Path, file: IO[bytes], item: zipfile.ZipInfo) -> Tensor:
    name = item.filename[:-4]
    if item.compress_type != zipfile.ZIP_STORED:
        message = "expected an uncompressed array, which can be memory-mapped (save again with numpy.savez)"
        raise CheckpointError(message, path=path, tensor=name)
    file.seek(item.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise CheckpointError("expected a local file header", path=path, tensor=name)
    start = item.header_offset + _LOCAL_HEADER + sum(np.frombuffer(header[26:30], "<u2").tolist())
    file.seek(start)
    shape, fortran, dtype = _npy_header(file)
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise CheckpointError(f"expected floats, got {dtype} (nothing was unpickled)", path=path, tensor=name)
    offset = file.tell()
    length = math.prod(shape) * dtype.itemsize
    if offset - start + length != item.file_size or offset + length > path.stat().st_size:
        raise CheckpointError(
            f"expected {length} bytes of data, got a truncated array", path=path, tensor=name
        )
    # Copy-on-write, because torch warns of read-only arrays; nothing here ever writes.
    array = (
        np.memmap(path, dtype, "c", offset, shape, "F" if fortran else "C")
        if length
        else np.zeros(shape, dtype)
    )
    return torch.from_numpy(array)


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    npy: Any = np.lib.format  # numpy ships these functions without types
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"expected npy format 1.0 or 2.0, got {version}")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype


def take(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], path: Path) -> Tensor:
    """The tensor `name`, which must have exactly `shape`.

    Raises: CheckpointError if it is missing or shaped otherwise.
    """
    tensor = tensors.get(name)
    if tensor is None:
        message = f"expected it among the file's tensors, got {sorted(tensors)}"
        raise CheckpointError(message, path=path, tensor=name)
    if tuple(tensor.shape) != shape:
        message = f"expected shape {list(shape)}, got {list(tensor.shape)}"
        raise CheckpointError(message, path=path, tensor=name)
    return tensor


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Scan tensors in chunks of a million numbers, so that memory stays bounded.

    Raises: CheckpointError naming the first tensor that holds a NaN or an infinity.
    """
    for name, tensor in tensors.items():
        # Split along the slow axis of memory: views of transposed files are never copied whole.
        plain = tensor.T if tensor.ndim == 2 and not tensor.is_contiguous() else tensor
        for chunk in torch.split(plain.reshape(-1), _SCAN_CHUNK):
            # A NaN or infinity always spoils the sum; only then (or on overflow) is the slower test needed.
            if not math.isfinite(chunk.sum(dtype=torch.float32)) and not torch.isfinite(chunk).all():
                raise CheckpointError("expected finite weights, got NaN or infinity", path=path, tensor=name)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read in bounded chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that appears whole or not at all, even if the machine stops in between.

    Args: path: replaced if it exists. tensors: contiguous. metadata: goes into the file's header.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(dict(tensors), part, dict(metadata or {}))
    # The library leaves files that only their owner can read; a server often runs as somebody else.
    part.chmod(0o644)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
