"""TopK with AuxK: the k largest pre-activations of each token, rectified.

    f = relu(top-k(W_enc(x − b_dec) + b_enc)),  L = ‖x − x̂‖² + AuxK

Source: Gao et al. 2024, arXiv:2406.04093, eq. 3 and §2.4.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from .auxk import AuxKOptions, add_aux_gradients, aux_loss
from .base import Export, Moment, Step
from .entries import SparseEntries
from .linear import LinearEncoder, tied_start
from .products import Parts
from .saelens_form import saelens_export
from .select import row_top_k

__all__ = ["TopK"]


class TopK(LinearEncoder):
    """See the module."""

    name: ClassVar[str] = "topk"
    Options = AuxKOptions

    @classmethod
    def start(cls, d_sae: int, b_dec: Tensor, options: AuxKOptions, seed: int) -> Self:
        return cls(tied_start(d_sae, b_dec, seed), options)

    def select(self, pre: Parts) -> tuple[SparseEntries, Tensor]:
        """The places that are kept of [B, F] pre-activations, all positive, and the values there."""
        return row_top_k(pre, self.options.k)

    def keep(self, acts: Tensor) -> Tensor:
        """The same in plain torch: [B, F] rectified activations with zeros where nothing is kept."""
        top = acts.topk(min(self.options.k, self.d_sae), dim=-1)
        return torch.zeros_like(acts).scatter(-1, top.indices, top.values)

    def loss(self, x: Tensor, moment: Moment) -> Tensor:
        acts = self.pre(x).relu()
        f = self.keep(acts)
        error = x - self.decode(f)
        loss = self.reconstruction_loss(x, f)
        if not moment.any_dead:
            return loss
        return loss + aux_loss(acts, self.parameters["decoder"], error, moment.dead, self.options.aux)

    def reconstruction_loss(self, x: Tensor, f: Tensor) -> Tensor:
        """‖x − x̂‖² per token, in plain torch."""
        return (x - self.decode(f)).square().sum() / len(x)

    @torch.no_grad()
    def step(self, x: Tensor, moment: Moment) -> Step:
        centred = x - self.parameters["b_dec"]
        entries, f = self.select(self.pre_parts(centred))
        loss, squared, error = self.pull(x, centred, entries, f)
        if moment.any_dead:
            loss = loss + add_aux_gradients(self, centred, error, moment.dead, self.options.aux)
        self.settle_b_dec()
        self.observe(f)
        return Step.of(loss, squared, entries.count(f > 0), len(x))

    def pull(
        self, x: Tensor, centred: Tensor, entries: SparseEntries, f: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Set the gradients of `reconstruction_loss`; returns it, the squared error, and x̂ − x [B, d]."""
        p = self.parameters
        error, squared = self.reconstruct(x, entries, f)
        toward = error * (2 / len(x))
        entries.weigh(f, toward, self.grad("decoder"))
        self.send_back(entries, entries.correlate(toward, p["decoder"]), centred, toward)
        return squared, squared, error

    def observe(self, f: Tensor) -> None:
        """Learn from the kept values of a step; TopK has nothing to learn."""

    def encode(self, x: Tensor) -> Tensor:
        return self.keep(self.pre(x).relu())

    def export(self, scale: float) -> Export:
        p = self.parameters
        return saelens_export(
            "topk",
            p,
            scale,
            biases={"b_enc": p["bias"]},
            config={"k": self.options.k, "rescale_acts_by_decoder_norm": False},
        )
