"""Standard (ReLU and L1): f = relu(W_enc(x − b_dec) + b_enc), L = ‖x − x̂‖² + λ Σ_i f_i‖d_i‖.

The decoder's norms are free, for the penalty counts them; they are folded away when the SAE is saved.

Source: Conerly et al., "Update on how we train SAEs", Anthropic, April 2024.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from .base import Export, Moment, Step
from .linear import tied_start
from .resample import ResampledEncoder, ResampleOptions
from .saelens_form import saelens_export
from .select import above

__all__ = ["DENSITY", "Standard", "StandardOptions"]

# Share of kept entries from which dense products are faster than sparse ones; measured at d = 256.
DENSITY = 0.12


class StandardOptions(ResampleOptions):
    """Settings of a standard SAE."""

    l1: Annotated[
        float, Field(ge=0, description="standard: λ of the L1 penalty, for inputs of mean square one.")
    ] = 0.05

    def default_lr(self, d_sae: int) -> float:
        return 2 * super().default_lr(d_sae)


class Standard(ResampledEncoder):
    """See the module."""

    name: ClassVar[str] = "standard"
    Options = StandardOptions

    @classmethod
    def start(cls, d_sae: int, b_dec: Tensor, options: StandardOptions, seed: int) -> Self:
        return cls(tied_start(d_sae, b_dec, seed), options)

    def loss(self, x: Tensor, moment: Moment) -> Tensor:
        p, f = self.parameters, self.pre(x).relu()
        rate: float = self.options.l1 * moment.warmth
        penalty = rate * (f @ p["decoder"].norm(dim=-1)).sum()
        missed = (x - f @ p["decoder"] - p["b_dec"]).square().sum()
        loss: Tensor = (missed + penalty) / len(x)
        return loss

    @torch.no_grad()
    def step(self, x: Tensor, moment: Moment) -> Step:
        p, centred = self.parameters, x - self.parameters["b_dec"]
        zero = torch.zeros_like(p["bias"])
        entries, f = above(self.pre_parts(centred), zero, self.room(x), DENSITY)
        error, squared = self.reconstruct(x, entries, f)
        toward = error * (2 / len(x))
        norms, rate = p["decoder"].norm(dim=-1), self.options.l1 * moment.warmth / len(x)
        totals = entries.sums(f)
        entries.weigh(f, toward, self.grad("decoder")).addcmul_(
            p["decoder"], (rate * totals / norms.clamp(min=1e-12)).unsqueeze(1)
        )
        d_pre = entries.correlate(toward, p["decoder"], plus=rate * norms)
        self.send_back(entries, d_pre, centred, toward)
        self.settle_b_dec()
        # Whatever is kept is positive: a feature fires where its sum does.
        l0 = squared.new_tensor(entries.size / len(x))
        return Step(squared + rate * (totals @ norms), squared, l0, totals > 0)

    def before_update(self) -> None:
        """Norms are free."""

    def after_update(self) -> None:
        """Norms are free."""

    def encode(self, x: Tensor) -> Tensor:
        return self.pre(x).relu() * self._norms()[:, 0]

    def decode(self, f: Tensor) -> Tensor:
        unit = self.parameters["decoder"] / self._norms()
        return f @ unit + self.parameters["b_dec"]

    def export(self, scale: float) -> Export:
        p, norms = self.parameters, self._norms()
        unit = {**p, "decoder": p["decoder"] / norms, "encoder": p["encoder"] * norms}
        return saelens_export("standard", unit, scale, biases={"b_enc": p["bias"] * norms[:, 0]})

    def _norms(self) -> Tensor:
        """[F, 1]: what features are multiplied and decoder rows divided by to have rows of norm one."""
        norms: Tensor = self.parameters["decoder"].norm(dim=-1, keepdim=True)
        return norms.clamp(min=1e-12)
