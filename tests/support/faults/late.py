"""What the faults share: the layer that has them, and the worker's extension by which they are imported."""

from __future__ import annotations

from typing import Any

__all__ = ["LATE", "Extension", "layer_of"]

LATE = 2  # The layer after which the SAE of the test lies.


class Extension:
    """Of a worker, which it leaves as it is."""


def layer_of(layer: Any) -> int:
    """The index of a decoder layer of vLLM's Llama."""
    return int(layer.self_attn.attn.layer_name.split(".")[2])
