"""VAEase: a variational autoencoder whose latents are shut where they know no more than the prior.

    μ = W_enc(x − b_dec) + b_enc,  s = W_gate(x − b_dec) + b_gate,  σ = sigmoid(−s) < 1
    z = μ + σ⊙ε,  x̂ = W_dec((1 − σ)⊙z) + b_dec
    L = ‖x − x̂‖²/γ + d·log γ + Σ_j (σ_j² + μ_j² − log σ_j² − 1),  γ learned

Inference takes ε = 0. Training never brings σ to exactly 1, so there a latent counts as active where s > 0,
that is σ < ½: its posterior is nearer to a point (σ = 0) than to the prior (σ = 1), and its gate 1 − σ more
open than shut. At the theory's optimum σ is near 0 or 1 and nowhere between, so that the exact place of the
line matters little; what is beyond it is 0, which makes the activations sparse.

    f = (1 − σ)⊙μ where s > 0, else 0

An active latent may be negative, for the prior is symmetric. Because both heads start along the decoder's
row, the gate opens on one side of it, and nearly all activations are positive.

The run's sparsity warm-up weighs the sum over latents, without which every latent would shut before it has
learnt anything. γ is trained as its logarithm, magnified: Adam moves every number by about the learning rate,
and γ has decades to go.

Source: Lu et al. 2025, arXiv:2506.04859. σ by a sigmoid, and the rule for active, are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .base import Architecture, Export, Moment, Options, Step
from .linear import tied_start
from .products import linear, mixed, weighed
from .saelens_form import saelens_export

__all__ = ["VaEase", "VaEaseOptions"]

# log γ = _GAMMA_RATE·`log_gamma`.
_GAMMA_RATE = 10.0
# At the start the noise of all latents together is about this share of the input's variance,
_NOISE_AT_START = 0.1
# and s changes by this much along the input's length: gates as flat as μ would open and shut far too slowly.
_SLOPE_AT_START = 4.0


class VaEaseOptions(Options):
    """Nothing is set of a VAEase SAE: γ, which weighs error against sparsity, is learned."""

    def default_lr(self, d_sae: int) -> float:
        # At lower rates γ and the gates are far from where they settle when a short run ends.
        return 4 * super().default_lr(d_sae)


class VaEase(Architecture):
    """See the module; `encoder` [F, d] and `bias` give μ, `gate` [F, d] and `gate_bias` s."""

    name: ClassVar[str] = "vaease"
    Options = VaEaseOptions

    @classmethod
    def start(cls, d_sae: int, b_dec: Tensor, options: VaEaseOptions, seed: int) -> Self:
        parameters = tied_start(d_sae, b_dec, seed)
        opening = min(0.5, (_NOISE_AT_START / d_sae) ** 0.5)
        parameters |= {
            "gate": parameters["decoder"] * _SLOPE_AT_START,
            "gate_bias": torch.full((d_sae,), math.log(opening / (1 - opening))),
            # The error is about 1 over d dimensions, of which γ is the variance of each.
            "log_gamma": torch.full((1,), -math.log(b_dec.shape[0]) / _GAMMA_RATE),
        }
        return cls(parameters, options)

    def loss(self, x: Tensor, moment: Moment) -> Tensor:
        centred = x - self.parameters["b_dec"]
        mu, s = self._head("encoder", "bias", centred), self._head("gate", "gate_bias", centred)
        sigma = torch.sigmoid(-s)
        z = mu + sigma * self._noise(x, moment)
        reconstruction = ((1 - sigma) * z) @ self.parameters["decoder"] + self.parameters["b_dec"]
        error = (x - reconstruction).square().sum() / len(x)
        minus_log_variance = 2 * torch.nn.functional.softplus(s)
        divergence = (sigma.square() + mu.square() + minus_log_variance - 1).sum() / len(x)
        log_gamma = _GAMMA_RATE * self.parameters["log_gamma"][0]
        loss: Tensor = error / log_gamma.exp() + self.d_in * log_gamma + moment.warmth * divergence
        return loss

    def _head(self, weight: str, bias: str, centred: Tensor) -> Tensor:
        return centred @ self.parameters[weight].T + self.parameters[bias]

    def _noise(self, x: Tensor, moment: Moment) -> Tensor:
        """ε [B, F], of the step's seed, so that a run that is resumed draws the same."""
        generator = torch.Generator(x.device).manual_seed(moment.seed)
        return self.scratch("noise", x).normal_(generator=generator)

    @torch.no_grad()
    def step(self, x: Tensor, moment: Moment) -> Step:
        p, count = self.parameters, len(x)
        centred = x - p["b_dec"]
        latents = self._sample(centred, moment)
        passed = self.scratch("passed", x)
        torch.sub(1, latents.sigma, out=passed).mul_(latents.z)
        error = mixed(passed, p["decoder"]).add_(p["b_dec"]).sub_(x)
        squared, log_gamma = error.square().sum() / count, _GAMMA_RATE * p["log_gamma"][0]
        toward = error * (2 / count / log_gamma.exp())
        weighed(passed, toward, self.grad("decoder"))
        p["b_dec"].grad = toward.sum(0)
        divergence, counts = latents.divergence() / count, (latents.sigma < 0.5).sum(0)
        d_mu, d_s = self._to_heads(latents, toward, moment.warmth / count)
        for weight, bias, part in (("encoder", "bias", d_mu), ("gate", "gate_bias", d_s)):
            weighed(part, centred, self.grad(weight))
            p[bias].grad = total = part.sum(0)
            # x enters both heads as x − b_dec.
            p["b_dec"].grad.sub_(total @ p[weight])
        p["log_gamma"].grad = (_GAMMA_RATE * (self.d_in - squared / log_gamma.exp())).reshape(1)
        loss = squared / log_gamma.exp() + self.d_in * log_gamma + moment.warmth * divergence
        return Step.of(loss, squared, counts, count)

    def _sample(self, centred: Tensor, moment: Moment) -> _Latents:
        noise = self._noise(centred, moment)
        mu, sigma = (
            self._product(name, weight, bias, centred)
            for name, weight, bias in (("mu", "encoder", "bias"), ("sigma", "gate", "gate_bias"))
        )
        sigma.neg_().sigmoid_()
        return _Latents(mu, sigma, noise, torch.addcmul(mu, sigma, noise, out=self.scratch("z", centred)))

    def _product(self, name: str, weight: str, bias: str, centred: Tensor) -> Tensor:
        p, out = self.parameters, self.scratch(name, centred)
        return linear(centred, p[weight], p[bias], self.precision).into(out)

    def _to_heads(self, latents: _Latents, toward: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """The gradients at μ and s, in the buffers of what is used up. Args: rate: KL's weight per latent.

        With g the gradient at (1 − σ)z:  ∂μ = g(1 − σ) + 2·rate·μ;
        ∂σ = g((1 − σ)ε − z) + rate·(2σ − 2/σ), and ∂s = −σ(1 − σ)·∂σ.
        """
        mu, sigma, noise, z = latents.mu, latents.sigma, latents.noise, latents.z
        g = linear(toward, self.parameters["decoder"]).into(self.scratch("passed", toward))
        open_ = 1 - sigma
        d_mu = mu.mul_(2 * rate).addcmul_(g, open_)
        d_sigma = noise.mul_(open_).sub_(z).mul_(g)
        # σ·∂σ: the KL's part is then finite though σ may round to 0.
        d_sigma.mul_(sigma).add_(sigma.square_().sub_(1), alpha=2 * rate)
        return d_mu, d_sigma.mul_(open_).neg_()

    def before_update(self) -> None:
        """Norms are free: the prior fixes the scale of the latents."""

    def after_update(self) -> None:
        """Norms are free."""

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        centred = x - self.parameters["b_dec"]
        s = self._head("gate", "gate_bias", centred)
        mu = self._head("encoder", "bias", centred)
        return torch.where(s > 0, torch.sigmoid(s) * mu, 0.0) * self._norms()[:, 0]

    def decode(self, f: Tensor) -> Tensor:
        return f @ (self.parameters["decoder"] / self._norms()) + self.parameters["b_dec"]

    def export(self, scale: float) -> Export:
        p, norms = self.parameters, self._norms()
        unit = {**p, "decoder": p["decoder"] / norms, "encoder": p["encoder"] * norms}
        return saelens_export(
            "vaease",
            unit,
            scale,
            biases={"b_enc": p["bias"] * norms[:, 0]},
            unscaled={"W_gate": (p["gate"] * scale).T, "b_gate": p["gate_bias"]},
        )

    def _norms(self) -> Tensor:
        """[F, 1]: what features are multiplied and decoder rows divided by to have rows of norm one."""
        norms: Tensor = self.parameters["decoder"].norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return norms


@dataclass(frozen=True)
class _Latents:
    """μ, σ, ε and z of a batch, [B, F] each, in buffers."""

    mu: Tensor
    sigma: Tensor
    noise: Tensor
    z: Tensor

    def divergence(self) -> Tensor:
        """Σ (σ² + μ² − log σ² − 1), 0-d."""
        total = self.sigma.square().sum() + self.mu.square().sum() - self.sigma.numel()
        divergence: Tensor = total - 2 * self.sigma.log().sum()
        return divergence
