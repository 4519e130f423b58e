"""What the model loses when it goes on with the SAE's reconstruction: the CE and KL scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerserve.errors import ConfigError

from .hooked import HookedModel
from .judged import Judged

__all__ = ["Spliced", "judge_splice", "spliced_in"]

BATCH = 16


@dataclass(frozen=True)
class Spliced:
    """Nats per predicted token, over the predictions that are made at ordinary tokens.

    Attributes:
        ce_clean, ce_sae, ce_zero: cross-entropy of the model as it is, with the reconstruction in place of
            the stream at every ordinary token, and with zeros there.
        kl_sae, kl_zero: KL divergence of the clean next-token distribution from the changed one.
        tokens: how many predictions.
    """

    ce_clean: float
    ce_sae: float
    ce_zero: float
    kl_sae: float
    kl_zero: float
    tokens: int

    @property
    def ce_score(self) -> float:
        """(CE_zero − CE_sae)/(CE_zero − CE_clean): 1 if nothing is lost, 0 if as much as with zeros."""
        span = self.ce_zero - self.ce_clean
        return (self.ce_zero - self.ce_sae) / span if span else 0.0

    @property
    def kl_score(self) -> float:
        """(KL_zero − KL_sae)/KL_zero, read likewise."""
        return (self.kl_zero - self.kl_sae) / self.kl_zero if self.kl_zero else 0.0


@torch.no_grad()
def judge_splice(
    model: HookedModel,
    judged: Judged,
    texts: Sequence[str],
    *,
    limit: int,
    progress: Callable[[int], None] | None = None,
) -> Spliced:
    """Compare three passes over each text: clean, spliced and zeroed. Special tokens are left alone.

    Args: limit: tokens of one text. progress: told how many texts each batch had.
    Raises: ConfigError if no text has two tokens.
    Source: sae_lens 6.54, `get_recons_loss`, and SAEBench's core evaluation; but there zeros replace special
        tokens too.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    count = 0
    rows = sorted((model.encode(text, limit) for text in texts), key=len)
    size = min(BATCH, model.rows_at_once(limit))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        if long := [row for row in part if len(row) > 1]:
            found, predicted = _compare(model, judged, long)
            sums += found
            count += predicted
        if progress is not None:
            progress(len(part))
    if count == 0:
        raise ConfigError("expected a text of at least two tokens to measure the model's loss on")
    clean, sae, zero, kl_sae, kl_zero = (sums / count).tolist()
    return Spliced(clean, sae, zero, kl_sae, kl_zero, count)


def spliced_in(judged: Judged) -> Callable[[Tensor, Tensor], Tensor]:
    """The edit that replaces the stream by its reconstruction."""

    def edit(stream: Tensor, ordinary: Tensor) -> Tensor:
        out = stream.clone()
        if ordinary.any():
            out[ordinary] = judged.reconstruct(stream[ordinary]).to(out.device, out.dtype)
        return out

    return edit


def zeroed(stream: Tensor, ordinary: Tensor) -> Tensor:
    """The edit that replaces the stream by zeros."""
    return torch.where(ordinary.unsqueeze(-1), 0.0, stream)


def _compare(model: HookedModel, judged: Judged, rows: list[list[int]]) -> tuple[Tensor, int]:
    ids, mask = model.batch(rows)
    predicts = model.ordinary(ids, mask)[:, :-1] & mask[:, 1:].bool()
    targets = ids[:, 1:][predicts]

    def passed(edit: Callable[[Tensor, Tensor], Tensor] | None) -> Tensor:
        return model.logits(ids, mask, edit)[:, :-1][predicts].log_softmax(-1)

    def loss(logprobs: Tensor) -> float:
        return -float(logprobs.gather(1, targets.unsqueeze(1)).double().sum())

    clean, sae, zero = passed(None), passed(spliced_in(judged)), passed(zeroed)
    weight = clean.exp()
    divergences = [float((weight * (clean - other)).double().sum()) for other in (sae, zero)]
    losses = [loss(logprobs) for logprobs in (clean, sae, zero)]
    return torch.tensor([*losses, *divergences], dtype=torch.float64), len(targets)
