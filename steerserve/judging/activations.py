"""The activations of many tokens, kept sparse: what every judgement of concepts is computed from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .judged import Judged

__all__ = ["SparseActivations"]


@dataclass(frozen=True, eq=False)
class SparseActivations:
    """The activations of n tokens that are not zero, in row order, on the CPU.

    Attributes:
        rows, features: [m] int64, where each one lies.
        values: [m] float32, f in raw units.
        gain: [n] float32, what the decoder multiplies a token's f by (1 for most SAEs).
        shape: (n, F).
    """

    rows: Tensor
    features: Tensor
    values: Tensor
    gain: Tensor
    shape: tuple[int, int]

    @classmethod
    @torch.no_grad()
    def of(
        cls, judged: Judged, x: Tensor, progress: Callable[[int], None] | None = None
    ) -> SparseActivations:
        """Encode n tokens. Args: x: [n, d]. progress: told how many tokens each part had."""
        rows, features, values, gains = [], [], [], []
        start = 0
        for part in x.split(judged.resident.tokens_at_once):
            encoded = judged.encode(part)
            places = encoded.f.nonzero()
            values.append(encoded.f[places[:, 0], places[:, 1]].cpu())
            rows.append(places[:, 0].cpu() + start)
            features.append(places[:, 1].cpu())
            gains.append(encoded.gain.cpu())
            start += len(part)
            if progress is not None:
                progress(len(part))
        shape = (start, judged.d_sae)
        return cls(torch.cat(rows), torch.cat(features), torch.cat(values), torch.cat(gains), shape)

    def maxima(self) -> Tensor:
        """[F] float32: each feature's largest activation; 0 where it never fired."""
        return torch.zeros(self.shape[1]).scatter_reduce_(0, self.features, self.values, "amax")

    def columns(self, features: Sequence[int]) -> Tensor:
        """[n, k] float32: the activations of k features on every token."""
        place = torch.full((self.shape[1],), -1, dtype=torch.long)
        place[list(features)] = torch.arange(len(features))
        kept = place[self.features] >= 0
        out = torch.zeros(self.shape[0], len(features))
        out[self.rows[kept], place[self.features[kept]]] = self.values[kept]
        return out

    def dense(self, tokens: Tensor) -> Tensor:
        """[m, F] float32: the named tokens as the decoder counts them, gain·f. Args: tokens: [m] int64."""
        place = torch.full((self.shape[0],), -1, dtype=torch.long)
        place[tokens] = torch.arange(len(tokens))
        kept = place[self.rows] >= 0
        out = torch.zeros(len(tokens), self.shape[1])
        values = self.values[kept] * self.gain[self.rows[kept]]
        out[place[self.rows[kept]], self.features[kept]] = values
        return out

    def pooled_mean(self, group: Tensor, groups: int) -> Tensor:
        """[groups, F] float32: the mean of gain·f over each group's tokens. Args: group: [n] int64."""
        flat = group[self.rows] * self.shape[1] + self.features
        total = torch.zeros(groups * self.shape[1])
        total.index_add_(0, flat, self.values * self.gain[self.rows])
        count = torch.bincount(group, minlength=groups).clamp(min=1)
        return total.view(groups, -1) / count.unsqueeze(1)

    def pooled_max(self, group: Tensor, groups: int) -> Tensor:
        """[groups, F] float32: the largest f in each group; 0 where a feature fired on none of it."""
        flat = group[self.rows] * self.shape[1] + self.features
        out = torch.zeros(groups * self.shape[1])
        return out.scatter_reduce_(0, flat, self.values, "amax").view(groups, -1)

    def detector_f1(self, label: Tensor, labels: int, threshold: Tensor) -> Tensor:
        """[F, L] float64: F1 of each feature, saying yes above its threshold, as a detector of each label.

        Args: label: [n] int64 in [0, L). threshold: [F].
        """
        says = self.values > threshold[self.features]
        features, own = self.features[says], label[self.rows[says]]
        both = torch.bincount(features * labels + own, minlength=self.shape[1] * labels)
        said = torch.bincount(features, minlength=self.shape[1]).unsqueeze(1)
        true = torch.bincount(label, minlength=labels).unsqueeze(0)
        return 2 * both.view(-1, labels).double() / (said + true).clamp(min=1)
