"""Kron: each feature is a soft AND of two of a few pre-activations, TopK over all of them, with AuxK.

    of each of h heads:  u = P(x − b_dec) + b_P  [m],  v = Q(x − b_dec) + b_Q  [n]
    z_ij = √(u_i·v_j) where both are positive, else 0;  f = top-k of all F = h·m·n;  L = ‖x − x̂‖² + AuxK

The encoder has h(m + n) rows for F features. Feature ((head·m) + i)·n + j is z_ij of that head.

∂z/∂u = z/2u grows without bound as u falls to 0, and one such entry would outvote a whole clipped gradient.
So u and v count as at least FLOOR there, in the gradient alone; features that are kept rarely lie below it.

Source: Kurochkin et al. 2025, arXiv:2505.22255, §3 (mAND), without reference to their code; the biases are
this trainer's, as in its TopK.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from steerserve.errors import ConfigError

from .auxk import AuxKOptions, aux_gradients, aux_loss
from .base import Architecture, Export, Moment, Step
from .entries import SparseEntries
from .outer import outer_top_k

__all__ = ["FLOOR", "Kron", "KronOptions"]

# In units of the normalised input, where x is about one long and a feature's part of it a tenth or more.
FLOOR = 1e-4
_SIDES = ("left", "right")


class KronOptions(AuxKOptions):
    """Settings of a Kron SAE."""

    heads: Annotated[
        int | None,
        Field(ge=1, description="kron: h; if not given, d_sae / (base·extension). h·m·n must be d_sae."),
    ] = None
    base: Annotated[int, Field(ge=1, description="kron: m, rows of P in each head.")] = 4
    extension: Annotated[int, Field(ge=1, description="kron: n, rows of Q in each head.")] = 4


class Kron(Architecture):
    """See the module; `left` [h·m, d] is P, `right` [h·n, d] Q, with `left_bias` and `right_bias`."""

    name: ClassVar[str] = "kron"
    Options = KronOptions

    @classmethod
    def start(cls, d_sae: int, b_dec: Tensor, options: KronOptions, seed: int) -> Self:
        heads = options.heads or max(1, d_sae // (options.base * options.extension))
        if heads * options.base * options.extension != d_sae:
            message = f"expected `heads`·`base`·`extension` to be `d_sae` {d_sae}"
            raise ConfigError(f"{message}, got {heads}·{options.base}·{options.extension}")
        generator = torch.Generator().manual_seed(seed)
        left, right = (
            torch.nn.functional.normalize(torch.randn(heads, n, len(b_dec), generator=generator), dim=-1)
            for n in (options.base, options.extension)
        )
        # A feature that fires where both of its factors do starts by writing both.
        decoder = torch.nn.functional.normalize(left.unsqueeze(2) + right.unsqueeze(1), dim=-1)
        parameters = {
            "b_dec": b_dec.clone(),
            "decoder": decoder.flatten(0, 2),
            "left": left.flatten(0, 1),
            "left_bias": torch.zeros(heads * options.base),
            "right": right.flatten(0, 1),
            "right_bias": torch.zeros(heads * options.extension),
        }
        return cls(parameters, options)

    @property
    def heads(self) -> int:
        """h."""
        return self.parameters["left"].shape[0] // self._shape[0]

    @property
    def _shape(self) -> tuple[int, int]:
        options = self.options
        return options.base, options.extension

    def loss(self, x: Tensor, moment: Moment) -> Tensor:
        p, acts = self.parameters, self._acts(x)
        f = self._keep(acts)
        error = x - self.decode(f)
        loss = error.square().sum() / len(x)
        if not moment.any_dead:
            return loss
        return loss + aux_loss(acts, p["decoder"], error, moment.dead, self.options.aux)

    def _acts(self, x: Tensor) -> Tensor:
        """z of every feature [B, F], in plain torch."""
        u, v = self._factors(x - self.parameters["b_dec"], torch.float32)
        (m, n), count = self._shape, len(x)
        pairs = torch.broadcast_tensors(u.view(count, -1, m, 1), v.view(count, -1, 1, n))
        z: Tensor = _Root.apply(*pairs)  # type: ignore[no-untyped-call]
        return z.reshape(count, -1)

    def _keep(self, acts: Tensor) -> Tensor:
        top = acts.topk(min(self.options.k, self.d_sae), dim=-1)
        return torch.zeros_like(acts).scatter(-1, top.indices, top.values)

    def _factors(self, centred: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        """u [B, h·m] and v [B, h·n], float32."""
        p, x = self.parameters, centred.to(precision)
        u, v = ((x @ p[side].T.to(precision)).float() + p[f"{side}_bias"] for side in _SIDES)
        return u, v

    @torch.no_grad()
    def step(self, x: Tensor, moment: Moment) -> Step:
        p = self.parameters
        centred = x - p["b_dec"]
        u, v = self._factors(centred, self.precision)
        entries, f = outer_top_k(u, v, self._shape, self.options.k)
        error = entries.decode(f, p["decoder"]).add_(p["b_dec"]).sub_(x)
        squared = error.square().sum() / len(x)
        toward = error * (2 / len(x))
        entries.weigh(f, toward, self.grad("decoder"))
        half = entries.correlate(toward, p["decoder"]).mul_(f).mul_(0.5)
        for side, factor, columns in zip(_SIDES, (u, v), self._places(entries.features), strict=True):
            kept = SparseEntries(entries.starts, columns, (len(x), factor.shape[1]))
            d_factor = half / factor[entries.rows.long(), columns.long()].clamp_(min=FLOOR)
            kept.weigh(d_factor, centred, self.grad(side))
            p[f"{side}_bias"].grad = kept.sums(d_factor)
        loss = squared if not moment.any_dead else squared + self._revive(u, v, centred, error, moment.dead)
        p["b_dec"].grad = toward.sum(0)
        for side in _SIDES:
            # x enters the encoder as x − b_dec.
            p["b_dec"].grad.sub_(_grad(p[f"{side}_bias"]) @ p[side])
        counts = entries.count(f > 0)
        return Step.of(loss, squared, counts, len(x))

    def _places(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Which columns of u and v make these features."""
        m, n = self._shape
        above = features // n
        return above, above // m * n + features % n

    def _revive(self, u: Tensor, v: Tensor, centred: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """Add AuxK's gradients; returns its loss."""
        p, where = self.parameters, dead.nonzero().squeeze(1)
        columns = self._places(where)
        own = [factor.index_select(1, at) for factor, at in zip((u, v), columns, strict=True)]
        acts = _root(*own)
        loss, d_acts, d_decoder = aux_gradients(acts, p["decoder"][where], error, dead, self.options.aux)
        half = d_acts.mul_(acts).mul_(0.5)
        _grad(p["decoder"]).index_add_(0, where, d_decoder)
        for side, factor, at in zip(_SIDES, own, columns, strict=True):
            d_factor = half / factor.clamp_(min=FLOOR)
            _grad(p[side]).index_add_(0, at, d_factor.T @ centred)
            _grad(p[f"{side}_bias"]).index_add_(0, at, d_factor.sum(0))
        return loss

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self._keep(self._acts(x))

    def export(self, scale: float) -> Export:
        p, (m, n) = self.parameters, self._shape
        tensors = {
            "W_dec": p["decoder"],
            "W_left": p["left"].T,
            "W_right": p["right"].T,
            # The root of a product scales as its factors do.
            "b_dec": p["b_dec"] / scale,
            "b_left": p["left_bias"] / scale,
            "b_right": p["right_bias"] / scale,
        }
        kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        sizes = {"heads": self.heads, "base": m, "extension": n, "k": self.options.k}
        return Export(kept, {"architecture": "kron", **sizes})


class _Root(torch.autograd.Function):
    """√(u·v) where both are positive, with FLOOR in the gradient. Args: u, v: of one shape."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        z = _root(u, v)
        ctx.save_for_backward(u, v, z)
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        u, v, z = ctx.saved_tensors
        half = grads[0] * z * 0.5
        return half / u.clamp(min=FLOOR), half / v.clamp(min=FLOOR)


def _root(u: Tensor, v: Tensor) -> Tensor:
    return (u.relu() * v.relu()).sqrt_()


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
