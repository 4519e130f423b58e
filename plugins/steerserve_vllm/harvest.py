"""`steerserve harvest`: run text through the served model and keep the residual stream at one hook point."""

from __future__ import annotations

from typing import Any

from steerserve.catalog import Catalog
from steerserve.config import HarvestConfig
from steerserve.hookpoint import HookPoint
from steerserve.training.capture import Capture
from steerserve.training.shards import ShardWriter

__all__ = ["open_capture"]


def open_capture(runner: Any, config: HarvestConfig, point: HookPoint, catalog: Catalog) -> Capture:
    """The capture of this worker, writing where the configuration says."""
    writer = ShardWriter(
        config.out,
        catalog.d_model,
        dtype="float32" if str(runner.model_config.dtype) == "torch.float32" else "bfloat16",
        hook=point.name,
        model=str(runner.model_config.model),
    )
    return Capture(writer, point, catalog.special_tokens)
