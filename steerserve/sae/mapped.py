"""A file mapped into memory: its tensors as views, which know where in the file they lie."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FileState", "MappedTensors", "state_of"]

# Linux' value on x86 and Arm, which Python 3.11 does not name. Without it a private writable mapping must fit
# into memory and swap.
_MAP_NORESERVE = 0x4000


class FileState(NamedTuple):
    """What changes when a file is replaced, rewritten or cut short."""

    device: int
    inode: int
    size: int
    modified_ns: int


def state_of(descriptor: int) -> FileState:
    """The state of an open file."""
    status = os.fstat(descriptor)
    return FileState(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class MappedTensors(dict[str, Tensor]):
    """Tensors by name, views of one mapped file: a page comes in when a value on it is first used.

    Attributes:
        path: the file.
        state: the file as it was mapped.
        offsets: the byte at which each tensor begins.
    Raises: OSError or ValueError if the file cannot be mapped (an empty one cannot).
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.offsets: dict[str, int] = {}
        with path.open("rb") as file:
            self.state = state_of(file.fileno())
            # Private and writable, for torch warns of read-only memory; nothing here ever writes.
            self._memory = mmap.mmap(
                file.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )

    def add(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int, *, fortran: bool = False
    ) -> int:
        """Map one tensor.

        Args: offset: its first byte. fortran: whether its first index runs fastest.
        Returns: the byte behind it.
        Raises: ValueError if it does not lie within the file.
        """
        count = math.prod(shape)
        end = offset + count * dtype.itemsize
        if not 0 <= offset <= end <= self.state.size:
            message = f"expected `{name}` within the file's {self.state.size} bytes"
            raise ValueError(f"{message}, got bytes {offset} to {end}")
        if count == 0:
            values = torch.empty(0, dtype=dtype)
        else:
            values = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)
        self[name] = (
            values.view(shape[::-1]).permute(*range(len(shape) - 1, -1, -1))
            if fortran
            else values.view(shape)
        )
        self.offsets[name] = offset
        return end
