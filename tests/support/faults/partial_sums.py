"""A layer hands on partial sums, and the next one reduces them, as DeepSeek-V3.2's do: replies are right."""

from __future__ import annotations

from typing import Any

from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.models.llama import LlamaDecoderLayer

from .late import LATE, Extension, layer_of

__all__ = ["Extension"]

_forward = LlamaDecoderLayer.forward


def forward(self: Any, positions: Any, hidden_states: Any, residual: Any) -> Any:
    self.mlp.down_proj.reduce_results = layer_of(self) != LATE
    if layer_of(self) == LATE + 1:
        hidden_states = tensor_model_parallel_all_reduce(hidden_states)
    return _forward(self, positions, hidden_states, residual)


LlamaDecoderLayer.forward = forward
