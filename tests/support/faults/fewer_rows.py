"""A layer hands on every other row, and the next one has all again, as under sequence parallelism."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.llama import LlamaDecoderLayer

LATE = 2  # The layer after which the SAE of the test lies.


class Extension:
    """Of a worker, which it leaves as it is."""


def _late(layer: Any) -> int:
    return int(layer.self_attn.attn.layer_name.split(".")[2])


_forward = LlamaDecoderLayer.forward


def forward(self: Any, positions: Any, hidden_states: Any, residual: Any) -> Any:
    if _late(self) == LATE + 1:
        hidden_states = hidden_states.repeat_interleave(2, 0)[: len(positions)]
        residual = residual.repeat_interleave(2, 0)[: len(positions)]
    out, added = _forward(self, positions, hidden_states, residual)
    return (out[::2].contiguous(), added[::2].contiguous()) if _late(self) == LATE else (out, added)


LlamaDecoderLayer.forward = forward
