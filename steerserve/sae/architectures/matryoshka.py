"""Matryoshka BatchTopK: every prefix of the dictionary must reconstruct by itself.

    L = ‖x − W_decᵀ f − b_dec‖² + μ Σ_m ‖x − W_dec[:m]ᵀ f[:m] − b_dec‖² + AuxK

Source: Bussmann et al. 2025, arXiv:2503.17547, eq. 5, where μ is 1.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from .auxk import AuxKOptions
from .batchtopk import BatchTopK
from .entries import SparseEntries

__all__ = ["Matryoshka", "MatryoshkaOptions"]


class MatryoshkaOptions(AuxKOptions):
    """Settings of a matryoshka SAE."""

    widths: Annotated[
        list[int] | None,
        Field(
            description="matryoshka: sizes of the nested prefixes, ascending, below d_sae; "
            "d_sae/16, /8, /4 and /2 if not given."
        ),
    ] = None
    inner: Annotated[
        float,
        Field(
            ge=0,
            description="matryoshka: μ, what an inner prefix's loss counts against the whole's. With less "
            "than 1 the whole explains more, and its first features are less general.",
        ),
    ] = 1.0


class Matryoshka(BatchTopK):
    """See the module."""

    name: ClassVar[str] = "matryoshka"
    Options = MatryoshkaOptions

    @property
    def exported_as(self) -> str:
        return "matryoshka_batchtopk"

    @property
    def bounds(self) -> list[int]:
        """0, the prefixes' sizes, and F."""
        given = self.options.widths
        inner = [self.d_sae // part for part in (16, 8, 4, 2)] if given is None else given
        return sorted({0, *inner, self.d_sae})

    @property
    def rates(self) -> list[float]:
        """What each prefix's loss counts, in the order of `bounds`."""
        return [float(self.options.inner)] * (len(self.bounds) - 2) + [1.0]

    def reconstruction_loss(self, x: Tensor, f: Tensor) -> Tensor:
        p, loss = self.parameters, torch.zeros(())
        for m, rate in zip(self.bounds[1:], self.rates, strict=True):
            error = x - f[:, :m] @ p["decoder"][:m] - p["b_dec"]
            loss = loss + rate * error.square().sum() / len(x)
        return loss

    def pull(
        self, x: Tensor, centred: Tensor, entries: SparseEntries, f: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        p, spans = self.parameters, list(pairwise(self.bounds))
        parts = [entries.columns(start, stop) for start, stop in spans]
        error, loss, errors = p["b_dec"] - x, torch.zeros((), device=x.device), []
        for (start, stop), (which, part), rate in zip(spans, parts, self.rates, strict=True):
            error = error + part.decode(f[which], p["decoder"][start:stop])
            loss = loss + rate * error.square().sum() / len(x)
            errors.append((error, rate))
        # A feature is in its own prefix and all wider ones: its gradient comes from their errors' sum.
        toward, d_pre, d_decoder = torch.zeros_like(x), torch.empty_like(f), self.grad("decoder")
        prefixes = list(zip(spans, parts, errors, strict=True))
        for (start, stop), (which, part), (missed, rate) in reversed(prefixes):
            toward = toward.add(missed, alpha=2 * rate / len(x))
            d_pre[which] = part.correlate(toward, p["decoder"][start:stop])
            part.weigh(f[which], toward, d_decoder[start:stop])
        self.send_back(entries, d_pre, centred, toward)
        return loss, error.square().sum() / len(x), error
