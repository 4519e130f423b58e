"""Batch top-k: the k·B largest pre-activations of a whole batch, and the sparse matrices they make."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Codes", "batch_top_k"]

# Every 61st number is looked at for a first threshold; a prime, so that no column is looked at alone.
_STRIDE = 61

with warnings.catch_warnings():
    # torch says once per process that CSR is in beta; said here, it is said to nobody.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(
        torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), (1, 1)
    )


@dataclass(frozen=True)
class Codes:
    """The kept entries of a [B, F] matrix of activations, in row-major order.

    Attributes:
        rows, features: [n] int64, where each entry lies.
        values: [n] float32, all positive.
        shape: (B, F).
    """

    rows: Tensor
    features: Tensor
    values: Tensor
    shape: tuple[int, int]

    def matrix(self, values: Tensor) -> Tensor:
        """[B, F] CSR with other `values` [n] at the same places."""
        return _csr(self.rows, self.features, values, self.shape)

    def transposed(self) -> Transposed:
        """The same places seen from the features."""
        order = torch.sort(self.features.int(), stable=True).indices
        return Transposed(order, self.features[order], self.rows[order], (self.shape[1], self.shape[0]))


@dataclass(frozen=True)
class Transposed:
    """The places of Codes in column-major order, sorted once for several sets of values."""

    order: Tensor
    features: Tensor
    rows: Tensor
    shape: tuple[int, int]

    def matrix(self, values: Tensor) -> Tensor:
        """[F, B] CSR. Args: values: [n], in the order of Codes."""
        return _csr(self.features, self.rows, values[self.order], self.shape)


def batch_top_k(pre: Tensor, count: int) -> Codes:
    """The `count` largest positive entries of a batch (all positive ones, where there are fewer).

    A threshold from a sample leaves few candidates, and the exact selection is made among those: the result
    is that of `pre.flatten().topk(count)`, at a tenth of the cost. Ties with the smallest kept entry stay.

    Args: pre: [B, F] float32, contiguous.
    Source: Bussmann et al. 2024, arXiv:2412.06410.
    """
    flat = pre.view(-1)
    places = _candidates(flat, count)
    values = flat[places]
    if len(places) > count:
        smallest = torch.kthvalue(values, len(values) - count + 1).values
        kept = values >= smallest
        places, values = places[kept], values[kept]
    rows = torch.div(places, pre.shape[1], rounding_mode="floor")
    return Codes(rows, places - rows * pre.shape[1], values, (pre.shape[0], pre.shape[1]))


def _candidates(flat: Tensor, count: int) -> Tensor:
    sample = flat[::_STRIDE]
    wanted = int(1.1 * count / _STRIDE) + 32
    if wanted < len(sample):
        bound = sample.topk(wanted).values[-1].clamp(min=0.0)
        places = (flat > bound).nonzero().squeeze(1)
        if len(places) >= count or bound == 0.0:
            return places
    # The sample misjudged the tail: every positive entry is a candidate.
    return (flat > 0.0).nonzero().squeeze(1)


def _csr(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    starts = torch.zeros(shape[0] + 1, dtype=torch.int32)
    torch.cumsum(torch.bincount(rows, minlength=shape[0]), 0, out=starts[1:])
    return torch.sparse_csr_tensor(starts, columns.int(), values, shape, check_invariants=False)
