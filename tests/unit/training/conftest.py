from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.sae import Hook
from steerserve.training.shards import ShardReader, ShardWriter

Harvest = Callable[..., ShardReader]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Matrices this small are not worth handing to other threads, which may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def harvest(tmp_path: Path) -> Harvest:
    """`harvest(activations)` → a reader of shards that hold them, float32, 1,000 rows each."""

    def write(activations: torch.Tensor, **settings: Any) -> ShardReader:
        folder = tmp_path / "shards"
        count, d_in = activations.shape
        kept = {"rows_per_shard": 1000, "dtype": "float32", **settings}
        with ShardWriter(folder, d_in, Hook(3, "resid_post"), "demo", **kept) as writer:
            numbers = torch.arange(count, dtype=torch.int32)
            writer.append(activations, numbers % 97, numbers // 50, numbers % 50)
        return ShardReader(folder)

    return write
