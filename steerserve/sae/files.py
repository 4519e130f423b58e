"""Tensors on disk, memory-mapped and distrusted: no byte of a weight is read before its header is checked."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steerserve.errors import CheckpointError

from .mapped import MappedTensors

__all__ = [
    "FLOATS",
    "check_finite",
    "check_sha256",
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
_READ_CHUNK = 2**22
_LENGTH = 8  # bytes before a safetensors header, which say how long it is
_LOCAL_HEADER = 30
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_KINDS = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NPY_KINDS = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64}


def inside(folder: Path, name: str) -> Path:
    """The real path of `folder/name`, which must be a plain file that lies within `folder`.

    Raises: CheckpointError if it is missing, no regular file, or a symlink that leads out of the folder.
    """
    path = folder / name
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"expected a regular file, got a link without an end: {error}", path=path
        ) from None
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
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"expected valid JSON: {error}", path=path) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"expected a JSON object, got {type(value).__name__}", path=path)
    return value


def map_safetensors(
    path: Path, dtypes: Collection[torch.dtype] = FLOATS
) -> tuple[MappedTensors, dict[str, str]]:
    """Every tensor of a safetensors file as a view of the memory-mapped file, and the file's metadata.

    The library checks header, offsets and length. Its own mapping cannot exceed the machine's memory, so the
    file is mapped here.

    Raises: CheckpointError if the file is truncated, malformed, or holds numbers of a kind not in `dtypes`.
    """
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            entries = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            metadata = file.metadata() or {}
        tensors = MappedTensors(path)
        with path.open("rb") as start:
            end = _LENGTH + int.from_bytes(start.read(_LENGTH), "little")
        for name, (kind, shape) in entries.items():
            dtype = _KINDS.get(kind)
            if dtype is None or dtype not in dtypes:
                message = f"expected one of {list(map(str, dtypes))}, got {dtype or kind}"
                raise CheckpointError(message, path=path, tensor=name)
            end = tensors.add(name, dtype, shape, end)
        if end != tensors.state.size:
            raise ValueError(f"its tensors end at byte {end} of {tensors.state.size}")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"expected a whole safetensors file: {error}", path=path) from None
    return tensors, metadata


def map_npz(path: Path) -> MappedTensors:
    """Every array of an uncompressed npz file as a view of the memory-mapped file.

    numpy.load cannot map inside an archive, so the arrays' offsets are taken from the zip directory.

    Raises: CheckpointError if the archive is damaged or compressed, or an array holds anything but floats
        (object arrays are pickles and are never read).
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            tensors = MappedTensors(path)
            for item in archive.infolist():
                if item.filename.endswith(".npy"):
                    _map_member(tensors, file, item)
            return tensors
    except CheckpointError:
        raise
    except Exception as error:  # what zipfile and numpy's header parser raise has no base of its own
        raise CheckpointError(f"expected a whole npz archive: {error}", path=path) from None


def _map_member(tensors: MappedTensors, file: IO[bytes], item: zipfile.ZipInfo) -> None:
    name, path = item.filename[:-4], tensors.path
    if item.compress_type != zipfile.ZIP_STORED:
        message = "expected an uncompressed array, which can be memory-mapped (save again with numpy.savez)"
        raise CheckpointError(message, path=path, tensor=name)
    file.seek(item.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise CheckpointError("expected a local file header", path=path, tensor=name)
    start = item.header_offset + _LOCAL_HEADER + sum(np.frombuffer(header[26:30], "<u2").tolist())
    file.seek(start)
    shape, fortran, numbers = _npy_header(file)
    dtype = _NPY_KINDS.get(numbers.str)
    if dtype is None:
        message = f"expected little-endian floats, got {numbers} (nothing was unpickled)"
        raise CheckpointError(message, path=path, tensor=name)
    offset = file.tell()
    length = math.prod(shape) * dtype.itemsize
    if offset - start + length != item.file_size or offset + length > tensors.state.size:
        raise CheckpointError(
            f"expected {length} bytes of data, got a truncated array", path=path, tensor=name
        )
    tensors.add(name, dtype, shape, offset, fortran=fortran)


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


def check_finite(
    tensors: Mapping[str, Tensor], path: Path, progress: Callable[[int], None] | None = None
) -> None:
    """Scan tensors in chunks of a million numbers, so that memory stays bounded.

    Args: progress: told the bytes of each chunk.
    Raises: CheckpointError naming the first tensor that holds a NaN or an infinity.
    """
    for name, tensor in tensors.items():
        # Split along the slow axis of memory: views of transposed files are never copied whole.
        plain = tensor.T if tensor.ndim == 2 and not tensor.is_contiguous() else tensor
        for chunk in torch.split(plain.reshape(-1), _SCAN_CHUNK):
            # A NaN or infinity always spoils the sum; only then (or on overflow) is the slower test needed.
            # Served as float32, so a wider number must be finite in that.
            if not math.isfinite(chunk.sum(dtype=torch.float32)) and not torch.isfinite(chunk.float()).all():
                raise CheckpointError("expected finite weights, got NaN or infinity", path=path, tensor=name)
            if progress is not None:
                progress(chunk.nbytes)


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of a file in hexadecimal, read in bounded chunks. Args: progress: told their bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_CHUNK):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def check_sha256(path: Path, expected: str, progress: Callable[[int], None] | None = None) -> None:
    """Compare a file to the manifest. Args: progress: as for `sha256_of`.

    Raises: CheckpointError if it differs.
    """
    if (found := sha256_of(path, progress)) != expected:
        message = f"expected sha256 {expected} as in the manifest, got {found} (the file was changed since)"
        raise CheckpointError(message, path=path)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that appears whole or not at all, even if the machine stops in between.

    Args: path: replaced if it exists. tensors: contiguous. metadata: goes into the file's header.
    Raises: CheckpointError if it cannot be written, on a full disk for example; a file that was there stays.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(dict(tensors), part, dict(metadata or {}))
        # The library leaves files that only their owner can read; a server often runs as somebody else.
        part.chmod(0o644)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"expected to write it: {error}", path=path) from None
