"""Gated: one encoder decides whether a feature is active (the gate) and, rescaled, how much (the magnitude).

    π = W_enc(x − b_dec) + b_gate;  f = 1[π > 0]·relu(e^{r_mag}⊙W_enc(x − b_dec) + b_mag)
    L = ‖x − x̂(f)‖² + λ‖relu π‖₁ + ‖x − x̂_frozen(relu π)‖²,  the decoder of the last held constant

Source: Rajamanoharan et al. 2024, arXiv:2404.16014, eq. 6 to 8.
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
from .standard import DENSITY

__all__ = ["Gated", "GatedOptions"]

# The encoder starts this short, and features grow into what they find: more planted ones are found so.
_ENCODER_START = 0.3


class GatedOptions(ResampleOptions):
    """Settings of a gated SAE."""

    l1: Annotated[
        float, Field(ge=0, description="gated: λ of the gate's L1 penalty, for inputs of mean square one.")
    ] = 0.15

    def default_lr(self, d_sae: int) -> float:
        return 2 * super().default_lr(d_sae)


class Gated(ResampledEncoder):
    """See the module; `bias` [F] is b_gate, `mag_bias` [F] b_mag, and `mag_scale` [F] r_mag."""

    name: ClassVar[str] = "gated"
    Options = GatedOptions

    @classmethod
    def start(cls, d_sae: int, b_dec: Tensor, options: GatedOptions, seed: int) -> Self:
        zeros = {name: torch.zeros(d_sae) for name in ("mag_bias", "mag_scale")}
        tied = tied_start(d_sae, b_dec, seed)
        tied["encoder"] *= _ENCODER_START
        return cls({**tied, **zeros}, options)

    def loss(self, x: Tensor, moment: Moment) -> Tensor:
        p, gate = self.parameters, self.pre(x)
        open_ = gate.relu()
        rate: float = self.options.l1 * moment.warmth
        frozen = open_ @ p["decoder"].detach() + p["b_dec"].detach()
        missed = (x - self.decode(self._magnitude(gate))).square().sum() + (x - frozen).square().sum()
        return (missed + rate * open_.sum()) / len(x)

    def _magnitude(self, gate: Tensor) -> Tensor:
        """[B, F] features from the gate's pre-activations, in plain torch."""
        p = self.parameters
        magnitude = p["mag_scale"].exp() * (gate - p["bias"]) + p["mag_bias"]
        return torch.where(gate > 0, magnitude.relu(), 0.0)

    @torch.no_grad()
    def step(self, x: Tensor, moment: Moment) -> Step:
        p, centred = self.parameters, x - self.parameters["b_dec"]
        zero = torch.zeros_like(p["bias"])
        entries, gate = above(self.pre_parts(centred), zero, self.room(x), DENSITY)
        stretch = entries.at(p["mag_scale"].exp())
        product = torch.sub(gate, entries.at(p["bias"]), out=entries.blank("product"))
        f = torch.mul(product, stretch, out=entries.blank("f")).add_(entries.at(p["mag_bias"]))
        f = entries.mask(f.relu_())
        on = f > 0
        error, squared = self.reconstruct(x, entries, f)
        frozen, missed = self.reconstruct(x, entries, gate)
        toward, toward_frozen = error * (2 / len(x)), frozen * (2 / len(x))
        entries.weigh(f, toward, self.grad("decoder"))
        d_magnitude = entries.only(entries.correlate(toward, p["decoder"], into="magnitude"), on)
        p["mag_bias"].grad = entries.sums(d_magnitude)
        d_product = d_magnitude.mul_(stretch)
        p["mag_scale"].grad = entries.sums(product.mul_(d_product))
        rate = self.options.l1 * moment.warmth / len(x)
        d_gate = entries.correlate(toward_frozen, p["decoder"], plus=torch.full_like(p["bias"], rate))
        self.send_back(entries, d_gate.add_(d_product), centred, toward)
        # The gate alone has the bias; the way back through the encoder is that of both paths.
        both = p["bias"].grad
        assert both is not None
        self.settle_b_dec()
        p["bias"].grad = both - entries.sums(d_product)
        loss = squared + missed + rate * gate.sum()
        return Step.of(loss, squared, entries.count(on), len(x))

    def resample(self, where: Tensor, directions: Tensor) -> None:
        super().resample(where, directions)
        for name in ("mag_bias", "mag_scale"):
            self.parameters[name][where] = 0.0

    def encode(self, x: Tensor) -> Tensor:
        return self._magnitude(self.pre(x))

    def export(self, scale: float) -> Export:
        p = self.parameters
        return saelens_export(
            "gated",
            p,
            scale,
            biases={"b_gate": p["bias"], "b_mag": p["mag_bias"]},
            unscaled={"r_mag": p["mag_scale"]},
        )
