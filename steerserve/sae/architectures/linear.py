"""The encoder that most architectures share, pre = W_enc(x − b_dec) + b_enc, and the way back through it."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Architecture
from .entries import Entries
from .products import Parts, linear

__all__ = ["LinearEncoder", "tied_start"]


def tied_start(d_sae: int, b_dec: Tensor, seed: int) -> dict[str, Tensor]:
    """Random unit decoder rows, with the encoder tied to them at the start and no bias.

    Args: b_dec: [d], in the units of the normalised input.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(d_sae, b_dec.shape[0], generator=generator)
    decoder = torch.nn.functional.normalize(decoder, dim=-1)
    return {
        "b_dec": b_dec.clone(),
        "bias": torch.zeros(d_sae),
        "decoder": decoder,
        "encoder": decoder.clone(),
    }


class LinearEncoder(Architecture):
    """An SAE with parameters encoder [F, d], bias [F], decoder [F, d] and b_dec [d], and perhaps others."""

    def pre(self, x: Tensor) -> Tensor:
        """[B, F] pre-activations, differentiable."""
        p = self.parameters
        return (x - p["b_dec"]) @ p["encoder"].T + p["bias"]

    def pre_parts(self, centred: Tensor) -> Parts:
        """The same some rows at a time: the whole matrix is never there. Args: centred: [B, d], x − b_dec."""
        p = self.parameters
        return linear(centred, p["encoder"], p["bias"], self.precision)

    def pre_of(self, where: Tensor, centred: Tensor) -> Tensor:
        """[B, n], those of a few features. Args: where: [n] int64. centred: [B, d]."""
        p = self.parameters
        return torch.addmm(p["bias"][where], centred, p["encoder"][where].T)

    def send_back(self, entries: Entries, d_pre: Tensor, centred: Tensor, toward: Tensor) -> None:
        """Set the gradients of encoder, bias and b_dec.

        Args: d_pre: the loss's gradient at the kept pre-activations. toward: [B, d], at the reconstruction.
        """
        p = self.parameters
        entries.weigh(d_pre, centred, self.grad("encoder"))
        p["bias"].grad = entries.sums(d_pre)
        p["b_dec"].grad = toward.sum(0)

    def settle_b_dec(self) -> None:
        """Add to b_dec's gradient its way through the encoder, once the bias's gradient is complete.

        x enters the encoder as x − b_dec: the gradient there is the bias's, sent back through the encoder.
        """
        p = self.parameters
        bias, b_dec = p["bias"].grad, p["b_dec"].grad
        assert bias is not None
        assert b_dec is not None
        b_dec.sub_(bias @ p["encoder"])

    def reconstruct(self, x: Tensor, entries: Entries, values: Tensor) -> tuple[Tensor, Tensor]:
        """The error x̂ − x [B, d], and its squared length per token (0-d)."""
        error = entries.decode(values, self.parameters["decoder"]).add_(self.parameters["b_dec"]).sub_(x)
        return error, error.square().sum() / len(x)
