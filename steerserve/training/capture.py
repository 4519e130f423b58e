"""Harvesting inside a worker: the residual stream at a hook point, as steering would see it, to shards."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..hookpoint import HookPoint
from .shards import ShardWriter

__all__ = ["Capture"]

Ints = NDArray[np.int32]


class Capture:
    """Appends the stream of every ordinary token to activation shards; special tokens are left out.

    Args:
        writer: where the activations go.
        point: the hook point.
        special_tokens: ids whose activations are outliers that an SAE is not trained on.
    """

    def __init__(self, writer: ShardWriter, point: HookPoint, special_tokens: frozenset[int]) -> None:
        self._writer = writer
        self._point = point.index
        self._special = np.array(sorted(special_tokens), dtype=np.int64)
        self._kept: Tensor | None = None
        self._columns: tuple[Tensor, Tensor, Tensor] | None = None

    def begin_step(
        self, request_ids: list[str], scheduled: Ints, computed: Ints, token_ids: NDArray[Any]
    ) -> None:
        """Choose the tokens of the coming step; see `Runtime.begin_step` for the arguments."""
        sequence = np.repeat([int(r.split("-", 1)[0]) for r in request_ids], scheduled)
        position = np.concatenate(
            [np.arange(c, c + n) for c, n in zip(computed.tolist(), scheduled.tolist(), strict=True)]
        )
        ids = token_ids[: len(sequence)]
        keep = np.flatnonzero(~np.isin(ids, self._special))
        self._kept = torch.from_numpy(keep)
        columns = (ids[keep], sequence[keep], position[keep])
        tokens, sequences, positions = (torch.from_numpy(c.astype(np.int32)) for c in columns)
        self._columns = (tokens, sequences, positions)

    def take(self, point: int, stream: Tensor, addend: Tensor | None) -> None:
        """Called by the op at every hook point: write the chosen tokens of this one."""
        if point != self._point or self._kept is None or self._columns is None:
            return
        rows = stream.index_select(0, self._kept).float()
        if addend is not None:
            rows += addend.index_select(0, self._kept)
        self._writer.append(rows, *self._columns)

    def end_step(self) -> None:
        """The forward pass is over."""
        self._kept = None

    def close(self) -> int:
        """Write what is buffered and the index; returns how many activations there are."""
        self._writer.close()
        return len(self._writer)
