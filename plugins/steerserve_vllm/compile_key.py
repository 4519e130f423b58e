"""The key of vLLM's compiled graphs takes the hook points: the op is part of the graph, where it stands.

vLLM's own key takes the additional config, which may name an SAE by its path alone. Where that is hooked is
then what its files say, and a graph of the same path and another layer would be loaded in silence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from .seams import wrap
from .setup import catalog_for

__all__ = ["install"]


def install() -> None:
    """Wrap the function that computes the key."""
    wrap("compile_key", _wrap_compute_hash)


def _wrap_compute_hash(original: Callable[..., str]) -> Callable[..., str]:
    def compute_hash(self: Any, *args: Any, **kwargs: Any) -> str:
        key = original(self, *args, **kwargs)
        catalog = catalog_for(self) if self.model_config is not None else None
        if catalog is None:
            return key
        points = ",".join(point.name for point in catalog.points)
        return hashlib.sha256(f"{key} {points}".encode()).hexdigest()[: len(key)]

    return compute_hash
