"""JumpReLU: f = z·H(z − θ) with a learned threshold of each feature, trained through its step.

    ∂f/∂θ = −(θ/ε)·K((z − θ)/ε),  ∂H/∂θ = −(1/ε)·K((z − θ)/ε),  K(u) = 1[|u| < ½]

The penalty is λ·L0, λ·(2/L0*)·(L0 − L0*)² towards a target, or λ·Σ tanh(c·f_i‖d_i‖). θ itself is trained, not
its logarithm, which hardly moves under Adam.

Source: Rajamanoharan et al. 2024, arXiv:2407.14435, eq. 3, 9, 11 and 12 (the step's pseudo-derivatives, L0);
Conerly et al., Anthropic, January 2025 (tanh, and what revives dead features).
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from .base import Export, Moment, Step
from .entries import Entries
from .linear import tied_start
from .resample import ResampledEncoder, ResampleOptions
from .saelens_form import saelens_export
from .select import above
from .standard import DENSITY

__all__ = ["JumpRelu", "JumpReluOptions"]

_TANH_SLOPE = 4.0
_LEAST_THRESHOLD = 1e-6
_BANDWIDTH = 0.8


class JumpReluOptions(ResampleOptions):
    """Settings of a JumpReLU SAE."""

    penalty: Annotated[
        Literal["l0", "quadratic", "tanh"],
        Field(description="jumprelu: l0 (λ·L0), quadratic (towards l0_target) or tanh."),
    ] = "quadratic"
    sparsity: Annotated[float, Field(ge=0, description="jumprelu: λ of the penalty.")] = 0.005
    l0_target: Annotated[
        float, Field(gt=0, description="jumprelu: L0*, where the quadratic penalty is zero.")
    ] = 32.0
    bandwidth: Annotated[
        float | None,
        Field(
            gt=0,
            description="jumprelu: ε, the width of the kernel for θ's gradient; 0.8/√d if not given.",
        ),
    ] = None
    revive: Annotated[
        float, Field(ge=0, description="jumprelu: what lifts the pre-activations of dead features to θ.")
    ] = 1e-4

    @property
    def betas(self) -> tuple[float, float]:
        return 0.0, 0.999


class JumpRelu(ResampledEncoder):
    """See the module; the parameter `threshold` [F] is θ."""

    name: ClassVar[str] = "jumprelu"
    # A feature that begins below its threshold would stay dead.
    restarted: ClassVar[float] = 1.0
    Options = JumpReluOptions

    @classmethod
    def start(cls, d_sae: int, b_dec: Tensor, options: JumpReluOptions, seed: int) -> Self:
        # On inputs of norm one, unit rows see numbers of standard deviation 1/√d: this share starts active.
        share = min(0.4, 6 * options.l0_target / d_sae)
        threshold = NormalDist().inv_cdf(1 - share) * b_dec.shape[0] ** -0.5
        tied = tied_start(d_sae, b_dec, seed)
        return cls({**tied, "threshold": torch.full((d_sae,), threshold)}, options)

    @property
    def bandwidth(self) -> float:
        """ε; by default as wide as four fifths of a random feature's standard deviation."""
        given: float | None = self.options.bandwidth
        return _BANDWIDTH * self.d_in**-0.5 if given is None else given

    def loss(self, x: Tensor, moment: Moment) -> Tensor:
        p, pre = self.parameters, self.pre(x)
        f = _jump_relu(pre, p["threshold"], self.bandwidth)
        loss = (x - self.decode(f)).square().sum() / len(x) + self._penalty(pre, f, moment)
        if not moment.any_dead:
            return loss
        below = (p["threshold"] - pre).relu()[:, moment.dead]
        rate: float = self.options.revive / len(x)
        return loss + rate * below.sum()

    def _penalty(self, pre: Tensor, f: Tensor, moment: Moment) -> Tensor:
        p, options = self.parameters, self.options
        rate: float = options.sparsity * moment.warmth
        target: float = options.l0_target
        if options.penalty == "tanh":
            return rate * torch.tanh(_TANH_SLOPE * f * p["decoder"].norm(dim=-1)).sum() / len(pre)
        l0 = _heaviside(pre, p["threshold"], self.bandwidth).sum() / len(pre)
        if options.penalty == "l0":
            return rate * l0
        return rate * 2 / target * (l0 - target) ** 2

    @torch.no_grad()
    def step(self, x: Tensor, moment: Moment) -> Step:
        p, centred = self.parameters, x - self.parameters["b_dec"]
        revived = None if not moment.any_dead else self._revival(centred, moment.dead)
        edge = p["threshold"] - self.bandwidth / 2
        entries, z = above(self.pre_parts(centred), edge, self.room(x), DENSITY)
        theta = entries.at(p["threshold"])
        on = z > theta
        f = entries.mask(entries.only(entries.blank("f").copy_(z), on))
        error, squared = self.reconstruct(x, entries, f)
        toward = error * (2 / len(x))
        entries.weigh(f, toward, self.grad("decoder"))
        d_f = entries.correlate(toward, p["decoder"])
        counts = entries.count(on & (z != 0))
        penalty, d_step = self._add_penalty(entries, f, d_f, counts, len(x), moment)
        near = ((z - theta).abs() < self.bandwidth / 2).to(z.dtype)
        at_theta = entries.mask(near.mul_(d_f * theta + d_step))
        p["threshold"].grad = entries.sums(at_theta).div_(-self.bandwidth)
        self.send_back(entries, entries.mask(entries.only(d_f, on)), centred, toward)
        loss = squared + penalty
        if revived is not None:
            loss = loss + self._add_revival(moment.dead, *revived)
        self.settle_b_dec()
        return Step.of(loss, squared, counts, len(x))

    def _add_penalty(
        self, entries: Entries, f: Tensor, d_f: Tensor, counts: Tensor, rows: int, moment: Moment
    ) -> tuple[Tensor, Tensor | float]:
        """Add the penalty's gradient to d_f and the decoder's; returns it, and its gradient at H(z − θ)."""
        p, options = self.parameters, self.options
        rate = options.sparsity * moment.warmth
        l0 = counts.sum() / rows
        if options.penalty == "l0":
            return rate * l0, rate / rows
        if options.penalty == "quadratic":
            over = l0 - options.l0_target
            return rate * 2 / options.l0_target * over**2, rate * 4 / options.l0_target * over / rows
        norms = p["decoder"].norm(dim=-1)
        bent = torch.tanh(_TANH_SLOPE * f * entries.at(norms))
        slope = (1 - bent.square()).mul_(_TANH_SLOPE * rate / rows)
        grad = p["decoder"].grad
        assert grad is not None
        grad.add_(p["decoder"] * (entries.sums(entries.mask(slope * f)) / norms).unsqueeze(1))
        d_f.add_(slope * entries.at(norms))
        return rate * bent.sum() / rows, 0.0

    def _revival(self, centred: Tensor, dead: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss that lifts dead features, and its gradients: of encoder rows, biases and thresholds."""
        where = dead.nonzero().squeeze(1)
        gap = self.parameters["threshold"][where] - self.pre_of(where, centred)
        rate = self.options.revive / len(centred)
        below = (gap > 0).to(gap.dtype).mul_(rate)
        lifted = below.sum(0)
        return rate * gap.relu_().sum(), -(below.T @ centred), -lifted, lifted

    def _add_revival(
        self, dead: Tensor, loss: Tensor, encoder: Tensor, bias: Tensor, theta: Tensor
    ) -> Tensor:
        where = dead.nonzero().squeeze(1)
        for name, part in (("encoder", encoder), ("bias", bias), ("threshold", theta)):
            grad = self.parameters[name].grad
            assert grad is not None
            grad.index_add_(0, where, part)
        return loss

    def resample(self, where: Tensor, directions: Tensor) -> None:
        super().resample(where, directions)
        threshold = self.parameters["threshold"]
        threshold[where] = threshold.median()

    def after_update(self) -> None:
        super().after_update()
        self.parameters["threshold"].clamp_(min=_LEAST_THRESHOLD)

    def encode(self, x: Tensor) -> Tensor:
        pre = self.pre(x)
        return torch.where(pre > self.parameters["threshold"], pre.relu(), 0.0)

    def export(self, scale: float) -> Export:
        p = self.parameters
        biases = {"b_enc": p["bias"], "threshold": p["threshold"]}
        return saelens_export("jumprelu", p, scale, biases=biases)


class _JumpRelu(torch.autograd.Function):
    """z·H(z − θ) with the pseudo-derivative of eq. 11."""

    @staticmethod
    def forward(context: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        context.save_for_backward(z, theta)
        context.bandwidth = bandwidth
        return z * (z > theta)

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        z, theta = context.saved_tensors
        near = (z - theta).abs() < context.bandwidth / 2
        return grads[0] * (z > theta), -(grads[0] * near * theta / context.bandwidth).sum(0), None


class _Heaviside(torch.autograd.Function):
    """H(z − θ) with the pseudo-derivative of eq. 12; z gets none."""

    @staticmethod
    def forward(context: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        context.save_for_backward(z, theta)
        context.bandwidth = bandwidth
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        z, theta = context.saved_tensors
        near = (z - theta).abs() < context.bandwidth / 2
        return None, -(grads[0] * near / context.bandwidth).sum(0), None


def _jump_relu(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    found: Tensor = _JumpRelu.apply(z, theta, bandwidth)  # type: ignore[no-untyped-call]
    return found


def _heaviside(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    found: Tensor = _Heaviside.apply(z, theta, bandwidth)  # type: ignore[no-untyped-call]
    return found
