"""A decode step in the shape of Llama 3.1 8B, of random weights: what it moves is a model's.

The LM head and sampling are left out, which makes steering look dearer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LLAMA_8B", "Cache", "Decoder", "Shape"]

Hook = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only transformer with grouped-query attention, and of what it has in its cache."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    context: int

    @property
    def head(self) -> int:
        """Width of an attention head."""
        return self.hidden // self.heads


LLAMA_8B = Shape(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, context=1024)


class Cache:
    """Keys and values of a batch: layers × [batch, kv_heads, context, head]; and the step's embeddings."""

    def __init__(self, shape: Shape, batch: int, device: torch.device | str, dtype: torch.dtype) -> None:
        size = (shape.layers, 2, batch, shape.kv_heads, shape.context, shape.head)
        self.parts = torch.randn(size, device=device, dtype=dtype)
        self.embedded = torch.randn(batch, shape.hidden, device=device, dtype=dtype)


class Decoder:
    """One token of each request through all layers; between them, the stream is in two parts, as in vLLM."""

    def __init__(self, shape: Shape, device: torch.device | str, dtype: torch.dtype) -> None:
        def matrices(outputs: int, inputs: int) -> list[Tensor]:
            size = (outputs, inputs)
            drawn = (torch.randn(size, device=device, dtype=dtype) for _ in range(shape.layers))
            return [matrix.mul_(inputs**-0.5) for matrix in drawn]

        self.shape = shape
        self.qkv = matrices((shape.heads + 2 * shape.kv_heads) * shape.head, shape.hidden)
        self.o = matrices(shape.hidden, shape.hidden)
        self.gate_up = matrices(2 * shape.ffn, shape.hidden)
        self.down = matrices(shape.hidden, shape.ffn)
        self.norm = torch.ones(shape.hidden, device=device, dtype=dtype)

    def step(self, cache: Cache, hooks: Mapping[int, Hook]) -> Tensor:
        """One decode step.

        Args: hooks: after these layers, called with the two parts of the stream, the first to be changed.
        Returns: [batch, hidden].
        """
        stream, residual = cache.embedded.clone(), torch.zeros_like(cache.embedded)
        for layer in range(self.shape.layers):
            residual = residual + stream
            stream = self._attention(layer, self._normed(residual), cache.parts[layer])
            residual = residual + stream
            gate, up = F.linear(self._normed(residual), self.gate_up[layer]).chunk(2, dim=-1)
            stream = F.linear(F.silu(gate) * up, self.down[layer])
            if hook := hooks.get(layer):
                hook(stream, residual)
        return self._normed(residual + stream)

    def _normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.shape.hidden,), self.norm, 1e-5)

    def _attention(self, layer: int, x: Tensor, cache: Tensor) -> Tensor:
        shape, batch = self.shape, len(x)
        sizes = [shape.heads * shape.head, shape.kv_heads * shape.head, shape.kv_heads * shape.head]
        q, k, v = F.linear(x, self.qkv[layer]).split(sizes, dim=-1)
        cache[0, :, :, -1] = k.view(batch, shape.kv_heads, shape.head)
        cache[1, :, :, -1] = v.view(batch, shape.kv_heads, shape.head)
        # The query heads of a group stand where positions would: every one attends to the whole cache.
        grouped = q.view(batch, shape.kv_heads, shape.heads // shape.kv_heads, shape.head)
        attended = F.scaled_dot_product_attention(grouped, cache[0], cache[1])
        return F.linear(attended.reshape(batch, shape.hidden), self.o[layer])
