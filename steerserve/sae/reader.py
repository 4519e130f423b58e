"""Single rows of a large file, read past its mapping."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from steerserve.errors import CheckpointError

from .mapped import MappedTensors, state_of

__all__ = ["RowReader"]

# Rows kept in memory, a feature's encoder row, decoder row and numbers counting one each.
_KEPT = 2048
_SAMPLES = 16


class RowReader:
    """Rows of a mapped file's tensors, by their place in the file.

    An encoder that is stored [d, F] has each value of a feature on a page of its own. Through the mapping
    these pages would count as resident memory (16 MB a feature where d is 4096, a gigabyte where the kernel
    reads ahead), and a file cut short would kill the process. A read does neither: it leaves the pages to
    the kernel's cache, and fails with an error.

    Args: tensors: what is read; kept for their places alone.
    Raises: CheckpointError if the file is no longer the one that was mapped.
    """

    def __init__(self, tensors: MappedTensors) -> None:
        self._tensors = tensors
        self._file = os.open(tensors.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        # A read then brings in one page, and not the megabytes behind it.
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        self._check_state()
        self._values = lru_cache(maxsize=_KEPT)(self._load)

    def holds(self, part: Tensor) -> bool:
        """Whether `part` is a view of the file."""
        return self._find(part) is not None

    def read(self, part: Tensor, rows: Sequence[int]) -> Tensor:
        """`part[rows]`, a copy.

        Args: part: [F] or [F, d], a view of the file in any memory order. rows: k indices in [0, F).
        Returns: [k] or [k, d], of the file's dtype.
        Raises: CheckpointError if the file was changed since it was mapped, cannot be read, or one of these
            values is not finite.
        """
        found = self._find(part)
        assert found is not None
        name, start = found
        size, row_step = part.element_size(), part.stride(0) * part.element_size()
        step, count = (part.stride(1) * size, part.shape[1]) if part.ndim == 2 else (size, 1)
        out = torch.empty(len(rows), *part.shape[1:], dtype=part.dtype)
        for place, row in enumerate(rows):
            out[place] = self._values(name, start + row * row_step, step, count)
        return out

    def _find(self, part: Tensor) -> tuple[str, int] | None:
        for name, whole in self._tensors.items():
            if 0 <= (distance := part.data_ptr() - whole.data_ptr()) < whole.nbytes:
                return name, self._tensors.offsets[name] + distance
        return None

    def _load(self, name: str, start: int, step: int, count: int) -> Tensor:
        """[count] values of a tensor (a single one as a scalar), `step` bytes apart."""
        self._check_state()
        dtype = self._tensors[name].dtype
        try:
            data = self._gather(start, step, count, dtype.itemsize)
        except OSError as error:
            raise CheckpointError(
                f"expected to read it: {error}", path=self._tensors.path, tensor=name
            ) from None
        if len(data) != count * dtype.itemsize:
            message = f"expected {count * dtype.itemsize} bytes, got {len(data)}: the file was cut short"
            raise CheckpointError(message, path=self._tensors.path, tensor=name)
        values = torch.frombuffer(data, dtype=dtype)
        if not torch.isfinite(values).all():
            message = "expected finite weights, got NaN or infinity"
            raise CheckpointError(message, path=self._tensors.path, tensor=name)
        return values if count > 1 else values[0]

    def _gather(self, start: int, step: int, count: int, size: int) -> bytearray:
        if step == size:
            return bytearray(os.pread(self._file, count * size, start))
        places = range(start, start + count * step, step)
        if not self._is_cached(places, size):
            # All at once: a disk that is asked for one after the other takes five times as long.
            for at in places:
                os.posix_fadvise(self._file, at, size, os.POSIX_FADV_WILLNEED)
        return bytearray().join([os.pread(self._file, size, at) for at in places])

    def _is_cached(self, places: range, size: int) -> bool:
        """Whether the kernel has these places in memory, by a sample of them."""
        value = [bytearray(size)]
        try:
            for at in places[:: max(1, len(places) // _SAMPLES)]:
                os.preadv(self._file, value, at, os.RWF_NOWAIT)
        except OSError:  # it would have to wait, or this file system cannot tell
            return False
        return True

    def _check_state(self) -> None:
        if (now := state_of(self._file)) != self._tensors.state:
            message = f"expected the file as it was opened, {self._tensors.state}, got {now}"
            raise CheckpointError(f"{message} (restart the server)", path=self._tensors.path)
