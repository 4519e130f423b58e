"""Switch: a router gives each token to one expert, a small TopK SAE of its own; the others are not computed.

    p = softmax(W_r(x − b_r)),  e = argmax p
    f = top-k(relu(W_enc^e(x − b_dec))),  x̂ = p_e·W_decᵉ f + b_dec
    L = ‖x − x̂‖² + α·E·Σ_i f_i P_i,  f_i the share of the batch that expert i got, P_i the mean of p_i

Expert i owns the features [i·F/E, (i+1)·F/E). The router learns through p_e and through P_i; the choice
itself has no gradient.

Source: Mudide et al. 2024, arXiv:2410.08201, §3; the load balance is Fedus et al. 2021, arXiv:2101.03961,
eq. 4 to 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from steerserve.errors import ConfigError

from .auxk import TopKOptions
from .base import Architecture, Export, Moment, Step
from .entries import Entries, SparseEntries
from .linear import tied_start
from .products import Parts
from .saelens_form import saelens_export
from .select import row_top_k

__all__ = ["Switch", "SwitchOptions"]


class SwitchOptions(TopKOptions):
    """Settings of a switch SAE."""

    experts: Annotated[int, Field(ge=1, description="switch: number of experts; it must divide d_sae.")] = 16
    balance: Annotated[
        float, Field(ge=0, description="switch: α, what keeps the load of the experts even.")
    ] = 0.1


@dataclass(frozen=True)
class _Routed:
    """A batch in the order of its experts.

    x, centred [B, d]: sorted by expert. p [B, E]. expert [B] int64, ascending. load [E]: tokens of each.
    """

    x: Tensor
    centred: Tensor
    p: Tensor
    expert: Tensor
    load: Tensor

    @property
    def gain(self) -> Tensor:
        """p_e, [B, 1]."""
        return self.p.gather(1, self.expert.unsqueeze(1))


class Switch(Architecture):
    """See the module; `router` [E, d] is W_r and `router_bias` [d] b_r."""

    name: ClassVar[str] = "switch"
    Options = SwitchOptions

    @classmethod
    def start(cls, d_sae: int, b_dec: Tensor, options: SwitchOptions, seed: int) -> Self:
        if d_sae % options.experts:
            message = f"expected `experts` to divide `d_sae` {d_sae}, got {options.experts}"
            raise ConfigError(message)
        parameters = tied_start(d_sae, b_dec, seed)
        del parameters["bias"]
        # Entries of variance one: so are the logits then, whatever the width, as ‖x‖ is about one.
        generator = torch.Generator().manual_seed(seed + 1)
        parameters["router"] = torch.randn(options.experts, b_dec.shape[0], generator=generator)
        parameters["router_bias"] = b_dec.clone()
        return cls(parameters, options)

    @property
    def size(self) -> int:
        """Features of one expert."""
        return self.d_sae // self._experts

    @property
    def _experts(self) -> int:
        return self.parameters["router"].shape[0]

    def loss(self, x: Tensor, moment: Moment) -> Tensor:
        p, shares = self.parameters, self._shares(x)
        chosen = torch.nn.functional.one_hot(shares.argmax(-1), self._experts)
        f = self._encode_all(x, chosen)
        reconstruction = (shares * chosen).sum(-1, keepdim=True) * (f @ p["decoder"]) + p["b_dec"]
        balance = self._experts * (chosen.float().mean(0) * shares.mean(0)).sum()
        squared = (x - reconstruction).square().sum() / len(x)
        loss: Tensor = squared + self.options.balance * balance
        return loss

    def _shares(self, x: Tensor) -> Tensor:
        """p, [B, E]."""
        p = self.parameters
        return torch.softmax((x - p["router_bias"]) @ p["router"].T, dim=-1)

    def _encode_all(self, x: Tensor, chosen: Tensor) -> Tensor:
        """f [B, F] by way of every expert, in plain torch. Args: chosen: [B, E], one-hot."""
        p = self.parameters
        own = chosen.bool().repeat_interleave(self.size, dim=-1)
        acts = torch.where(own, ((x - p["b_dec"]) @ p["encoder"].T).relu(), 0.0)
        top = acts.topk(min(self.options.k, self.size), dim=-1)
        return torch.zeros_like(acts).scatter(-1, top.indices, top.values)

    @torch.no_grad()
    def step(self, x: Tensor, moment: Moment) -> Step:
        p, routed = self.parameters, self._route(x)
        entries, f = self._select(routed)
        rows = entries.rows.long()
        gain = routed.gain[rows, 0]
        # Before the gain, for the router learns from what its choice decodes to.
        decoded = entries.decode(f, p["decoder"])
        error = (decoded * routed.gain).add_(p["b_dec"]).sub_(routed.x)
        toward = error * (2 / len(x))
        entries.weigh(f * gain, toward, self.grad("decoder"))
        d_pre = entries.correlate(toward, p["decoder"]).mul_(gain)
        self._send_back(entries, d_pre, routed.centred, toward)
        balance = self._teach_router(routed, (toward * decoded).sum(-1))
        squared = error.square().sum() / len(x)
        return Step.of(squared + balance, squared, entries.count(f > 0), len(x))

    def _route(self, x: Tensor) -> _Routed:
        p = self._shares(x)
        expert, order = p.argmax(-1).sort(stable=True)
        x, load = x[order], torch.bincount(expert, minlength=self._experts)
        return _Routed(x, x - self.parameters["b_dec"], p[order], expert, load)

    def _select(self, routed: _Routed) -> tuple[SparseEntries, Tensor]:
        """What is kept of each token, encoded by its own expert alone; the tokens in the experts' order."""
        encoder = self.parameters["encoder"].view(self._experts, self.size, self.d_in)

        def own() -> Iterator[tuple[slice, Tensor]]:
            start = 0
            for expert, count in enumerate(routed.load.tolist()):
                rows = slice(start, start + count)
                # Of another size at every step: oneDNN would prepare itself anew for each.
                product = routed.centred[rows].to(self.precision) @ encoder[expert].T.to(self.precision)
                yield rows, product.float()
                start += count

        shape = (len(routed.x), self.size)
        kept, f = row_top_k(Parts(shape, routed.x.device, own), self.options.k)
        first = (routed.expert * self.size).int()[kept.rows.long()]
        return SparseEntries(kept.starts, kept.features + first, (shape[0], self.d_sae)), f

    def _send_back(self, entries: Entries, d_pre: Tensor, centred: Tensor, toward: Tensor) -> None:
        p = self.parameters
        entries.weigh(d_pre, centred, self.grad("encoder"))
        # x enters the encoder as x − b_dec.
        p["b_dec"].grad = toward.sum(0) - entries.sums(d_pre) @ p["encoder"]

    def _teach_router(self, routed: _Routed, d_gain: Tensor) -> Tensor:
        """Set the router's gradients; returns the weighted load balance. Args: d_gain: [B], at p_e."""
        p, count = self.parameters, len(d_gain)
        load = routed.load / count
        rate = self.options.balance * self._experts
        d_p = (load * (rate / count)).expand(count, -1).clone()
        d_p.scatter_add_(1, routed.expert.unsqueeze(1), d_gain.unsqueeze(1))
        d_logits = routed.p * (d_p - (routed.p * d_p).sum(-1, keepdim=True))
        p["router"].grad = d_logits.T @ (routed.x - p["router_bias"])
        p["router_bias"].grad = -d_logits.sum(0) @ p["router"]
        balance: Tensor = rate * (load * routed.p.mean(0)).sum()
        return balance

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        chosen = torch.nn.functional.one_hot(self._shares(x).argmax(-1), self._experts)
        return self._encode_all(x, chosen)

    def decode(self, f: Tensor) -> Tensor:
        """Not to be had from activations alone, which the token's p_e weighs: see `autoencode`."""
        raise TypeError("expected `autoencode(x)`: what a switch SAE decodes depends on the token")

    @torch.no_grad()
    def autoencode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f, gain = self.encode(x), self._shares(x).amax(-1, keepdim=True)
        return f, gain * (f @ self.parameters["decoder"]) + self.parameters["b_dec"]

    def export(self, scale: float) -> Export:
        p = self.parameters
        return saelens_export(
            "switch",
            p,
            scale,
            biases={"b_router": p["router_bias"]},
            unscaled={"W_router": p["router"] * scale},
            config={"experts": self._experts, "k": self.options.k},
        )
