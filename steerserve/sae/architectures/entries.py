"""The kept entries of a [B, F] matrix of activations, and the products a training step needs of them.

A step is written once on `Entries`. Where few entries are kept they are a list, and every product costs
O(n·d); where many are, they are the matrix with zeros, and the products are dense.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .products import linear, mixed, weighed

__all__ = ["DenseEntries", "Entries", "SparseEntries"]

with warnings.catch_warnings():
    # torch says once per process that CSR is in beta; said here, it is said to nobody.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(
        torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), (1, 1)
    )


class Entries(ABC):
    """Places in a [B, F] matrix. Numbers at those places are `values`: [n], or [B, F] and 0 elsewhere."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many places."""

    @abstractmethod
    def at(self, per_feature: Tensor) -> Tensor:
        """The number of each entry's feature, in the form of values. Args: per_feature: [F]."""

    @abstractmethod
    def decode(self, values: Tensor, decoder: Tensor) -> Tensor:
        """values @ decoder. Args: decoder: [F, d]. Returns: [B, d]."""

    @abstractmethod
    def correlate(
        self, toward: Tensor, decoder: Tensor, plus: Tensor | None = None, into: str = "gradient"
    ) -> Tensor:
        """toward @ decoderᵀ + plus at the kept places: values.

        Args:
            toward: [B, d]. decoder: [F, d]. plus: [F].
            into: names the buffer that is used where values are a matrix: see `blank`.
        """

    @abstractmethod
    def blank(self, name: str) -> Tensor:
        """Room for values, not filled; where they are a matrix, the same room for the same name."""

    @abstractmethod
    def weigh(self, values: Tensor, inputs: Tensor, out: Tensor) -> Tensor:
        """valuesᵀ @ inputs, written into `out` [F, d] and returned. Args: inputs: [B, d]."""

    @abstractmethod
    def sums(self, values: Tensor) -> Tensor:
        """The sum of each feature's values, [F]."""

    @abstractmethod
    def mask(self, values: Tensor) -> Tensor:
        """`values` with zeros where no entry is kept, in place; as they are, where they are a list."""

    @abstractmethod
    def only(self, values: Tensor, which: Tensor) -> Tensor:
        """`values` with zeros where `which` does not hold, in place. Args: which: bool values."""

    @abstractmethod
    def count(self, which: Tensor) -> Tensor:
        """How often each feature is among the places where `which` holds, [F]. Args: which: bool values."""


@dataclass(frozen=True)
class SparseEntries(Entries):
    """A list of n places in row-major order.

    Attributes:
        starts: [B + 1] int32, where each row begins.
        features: [n] int32.
        shape: (B, F).
    """

    starts: Tensor
    features: Tensor
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        return len(self.features)

    @cached_property
    def rows(self) -> Tensor:
        """[n] int32."""
        numbers = torch.arange(self.shape[0], dtype=torch.int32, device=self.starts.device)
        return numbers.repeat_interleave(self.starts.diff(), output_size=len(self.features))

    def subset(self, which: Tensor) -> SparseEntries:
        """The places for which `which` [n] bool holds."""
        before = torch.zeros(len(which) + 1, dtype=torch.int32, device=which.device)
        torch.cumsum(which, 0, out=before[1:])
        return SparseEntries(before[self.starts.long()], self.features[which], self.shape)

    def columns(self, start: int, stop: int) -> tuple[Tensor, SparseEntries]:
        """Which places [n] bool lie in features [start, stop), and those, as a [B, stop − start] matrix."""
        which = (self.features >= start) & (self.features < stop)
        part = self.subset(which)
        return which, SparseEntries(part.starts, part.features - start, (self.shape[0], stop - start))

    def at(self, per_feature: Tensor) -> Tensor:
        return per_feature.index_select(0, self.features)

    def decode(self, values: Tensor, decoder: Tensor) -> Tensor:
        return self._matrix(values) @ decoder

    def correlate(
        self, toward: Tensor, decoder: Tensor, plus: Tensor | None = None, into: str = "gradient"
    ) -> Tensor:
        # The decoder's transpose is a view; beta leaves the values that stand in the matrix out.
        pattern = self._matrix(torch.zeros(len(self.features), dtype=toward.dtype, device=toward.device))
        product: Tensor = torch.sparse.sampled_addmm(pattern, toward, decoder.T, beta=0.0)
        return product.values() if plus is None else product.values().add_(self.at(plus))

    def blank(self, name: str) -> Tensor:
        return torch.empty(len(self.features), device=self.features.device)

    def weigh(self, values: Tensor, inputs: Tensor, out: Tensor) -> Tensor:
        order, starts, rows = self._by_feature
        matrix = _csr(starts, rows, values[order], (self.shape[1], self.shape[0]))
        return torch.addmm(out, matrix, inputs, beta=0, out=out)

    def sums(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.shape[1]).index_add_(0, self.features, values)

    def mask(self, values: Tensor) -> Tensor:
        return values

    def only(self, values: Tensor, which: Tensor) -> Tensor:
        return values.mul_(which)

    def count(self, which: Tensor) -> Tensor:
        return torch.bincount(self.features[which], minlength=self.shape[1])

    def _matrix(self, values: Tensor) -> Tensor:
        return _csr(self.starts, self.features, values, self.shape)

    @cached_property
    def _by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """The places in column-major order, sorted once for several sets of values: order, starts, rows."""
        n = len(self.features)
        starts = torch.zeros(self.shape[1] + 1, dtype=torch.int32, device=self.starts.device)
        torch.cumsum(torch.bincount(self.features, minlength=self.shape[1]), 0, out=starts[1:])
        if self.starts.device.type != "cpu":
            order = torch.sort(self.features, stable=True).indices
            return order, starts, self.rows[order]
        from . import loops

        order, rows = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int32)
        places = starts.numpy().copy()
        loops.transpose(self.starts.numpy(), self.features.numpy(), places, order.numpy(), rows.numpy())
        return order, starts, rows


@dataclass(frozen=True)
class DenseEntries(Entries):
    """A mask over the whole matrix.

    Attributes:
        kept: [B, F] bool.
        room: gives a [B, F] float32 buffer, the same for the same name.
        total: how many places are kept.
    """

    kept: Tensor
    room: Callable[[str], Tensor]
    total: int

    @property
    def size(self) -> int:
        return self.total

    def at(self, per_feature: Tensor) -> Tensor:
        return per_feature

    def decode(self, values: Tensor, decoder: Tensor) -> Tensor:
        return mixed(values, decoder)

    def correlate(
        self, toward: Tensor, decoder: Tensor, plus: Tensor | None = None, into: str = "gradient"
    ) -> Tensor:
        out = self.room(into)
        for rows, part in linear(toward, decoder, plus):
            _copy_only(part, self.kept[rows], out[rows])
        return out

    def blank(self, name: str) -> Tensor:
        return self.room(name)

    def weigh(self, values: Tensor, inputs: Tensor, out: Tensor) -> Tensor:
        return weighed(values, inputs, out)

    def sums(self, values: Tensor) -> Tensor:
        return values.sum(0)

    def mask(self, values: Tensor) -> Tensor:
        return self.only(values, self.kept)

    def only(self, values: Tensor, which: Tensor) -> Tensor:
        # torch multiplies floats by bools at an eighth of the speed, and sums bools slower still.
        if values.device.type != "cpu":
            return values.mul_(which)
        from . import loops

        loops.over_rows(loops.only, len(values), values.numel(), values.numpy(), which.numpy())
        return values

    def count(self, which: Tensor) -> Tensor:
        if which.device.type != "cpu":
            return which.sum(0)
        from . import loops

        counts = torch.zeros(which.shape[1], dtype=torch.int64)
        loops.column_counts(which.numpy(), counts.numpy())
        return counts


def _copy_only(values: Tensor, which: Tensor, out: Tensor) -> None:
    """Values where `which` holds and zeros elsewhere, [rows, F], written into `out`."""
    if values.device.type != "cpu":
        torch.mul(values, which, out=out)
        return
    from . import loops

    own = (values.numpy(), which.numpy(), out.numpy())
    loops.over_rows(loops.copy_only, len(values), values.numel(), *own)


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
