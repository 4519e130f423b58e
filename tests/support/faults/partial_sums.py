"""A layer hands on partial sums, and the next one reduces them, as DeepSeek-V3.2's do: replies are right."""

from __future__ import annotations

from typing import Any

from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.models.llama import LlamaDecoderLayer

LATE = 2  # The layer after which the SAE of the test lies.


class Extension:
    """Of a worker, which it leaves as it is."""


def _late(layer: Any) -> int:
    return int(layer.self_attn.attn.layer_name.split(".")[2])


_forward = LlamaDecoderLayer.forward


def forward(self: Any, positions: Any, hidden_states: Any, residual: Any) -> Any:
    self.mlp.down_proj.reduce_results = _late(self) != LATE
    if _late(self) == LATE + 1:
        hidden_states = tensor_model_parallel_all_reduce(hidden_states)
    return _forward(self, positions, hidden_states, residual)


LlamaDecoderLayer.forward = forward
