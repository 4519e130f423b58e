"""BatchTopK with AuxK: the k·B largest pre-activations of a batch; at inference, a threshold.

    θ = the running mean of the batches' smallest kept activation;  f = pre·1[pre > θ]

Source: Bussmann et al. 2024, arXiv:2412.06410, §3.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from .auxk import AuxKOptions
from .base import Export
from .entries import SparseEntries
from .linear import tied_start
from .products import Parts
from .saelens_form import saelens_export
from .select import batch_top_k
from .topk import TopK

__all__ = ["BatchTopK"]

_THRESHOLD_RATE = 0.01


class BatchTopK(TopK):
    """See the module. Over several processes, each selects within its own part of the batch.

    Buffers: `threshold`, θ; `seen`, the steps it was learnt from; 0-d float64 each.
    """

    name: ClassVar[str] = "batchtopk"

    @classmethod
    def start(cls, d_sae: int, b_dec: Tensor, options: AuxKOptions, seed: int) -> Self:
        zeros = {name: torch.zeros((), dtype=torch.float64) for name in ("seen", "threshold")}
        return cls(tied_start(d_sae, b_dec, seed), options, zeros)

    def select(self, pre: Parts) -> tuple[SparseEntries, Tensor]:
        return batch_top_k(pre, self.options.k * pre.shape[0])

    def keep(self, acts: Tensor) -> Tensor:
        count = min(self.options.k * len(acts), acts.numel())
        bound = acts.flatten().topk(count).values[-1]
        return torch.where(acts >= bound, acts, 0.0)

    def observe(self, f: Tensor) -> None:
        smallest = f.min() if len(f) else torch.zeros(())
        threshold, seen = self.buffers["threshold"], self.buffers["seen"]
        # The last hundred steps, or the last tenth of a run that is still short.
        rate = (10 / (seen + 10)).clamp(min=_THRESHOLD_RATE)
        threshold += rate * (smallest - threshold)
        seen += 1

    def encode(self, x: Tensor) -> Tensor:
        pre = self.pre(x)
        return torch.where(pre > self.buffers["threshold"], pre.relu(), 0.0)

    def export(self, scale: float) -> Export:
        p = self.parameters
        threshold = torch.full_like(p["bias"], float(self.buffers["threshold"]))
        return saelens_export("jumprelu", p, scale, biases={"b_enc": p["bias"], "threshold": threshold})
