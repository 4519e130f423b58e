"""A layer hands on every other row, and the next one has all again, as under sequence parallelism."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.llama import LlamaDecoderLayer

from .late import LATE, Extension, layer_of

__all__ = ["Extension"]

_forward = LlamaDecoderLayer.forward


def forward(self: Any, positions: Any, hidden_states: Any, residual: Any) -> Any:
    if layer_of(self) == LATE + 1:
        hidden_states = hidden_states.repeat_interleave(2, 0)[: len(positions)]
        residual = residual.repeat_interleave(2, 0)[: len(positions)]
    out, added = _forward(self, positions, hidden_states, residual)
    return (out[::2].contiguous(), added[::2].contiguous()) if layer_of(self) == LATE else (out, added)


LlamaDecoderLayer.forward = forward
