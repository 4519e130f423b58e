"""Which feature stands for which domain: scores on held-out tokens, and shares of the mean difference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from demo.corpus.documents import labelled_documents, tokenise
from demo.corpus.sentences import DOMAINS
from steerserve.sae import Sae
from steerserve.training.evaluate import DetectorCounts
from steerserve.training.shards import ShardReader

__all__ = ["Detectors", "Score", "judge"]

# A detector says yes above one of these shares of the feature's maximum; the best one is recorded.
THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
BATCH = 4096


@dataclass(frozen=True)
class Score:
    """A feature as a detector of a domain, token by token, saying yes above `threshold` (raw units)."""

    f1: float
    precision: float
    recall: float
    threshold: float


@dataclass(frozen=True)
class Detectors:
    """Scores over held-out tokens, [F, D] each, domains in the order of DOMAINS.

    Attributes:
        precision, recall, f1: at each feature's and domain's best threshold.
        threshold: that threshold, raw units.
        contribution: what share of the domain's mean difference (mean stream inside − outside) the feature
            carries: (mean f inside − outside)·(d_j·δ)/‖δ‖². Over all features it sums to nearly 1.
    """

    precision: Tensor
    recall: Tensor
    f1: Tensor
    threshold: Tensor
    contribution: Tensor

    def score(self, feature: int, domain: str) -> Score:
        """One feature judged for one domain."""
        at = (feature, DOMAINS.index(domain))
        columns = (self.f1, self.precision, self.recall, self.threshold)
        return Score(*(round(float(column[at]), 4) for column in columns))

    def best(self, domain: str, count: int) -> list[int]:
        """The features with the highest F1."""
        return self.f1[:, DOMAINS.index(domain)].topk(count).indices.tolist()

    def carriers(self, domain: str, count: int) -> list[int]:
        """The features that carry most of the domain's mean difference; fewer where fewer carry any."""
        found = self.contribution[:, DOMAINS.index(domain)].topk(count)
        return [int(j) for value, j in zip(found.values, found.indices, strict=True) if value > 0]


@torch.no_grad()
def judge(sae: Sae, reader: ShardReader, tokenizer: Any, seed: int, held_out: int) -> Detectors:
    """Judge every feature on the last `held_out` tokens of a harvest of `labelled_documents(seed, …)`."""
    first = len(reader) - held_out
    truth = _truth(reader, first, tokenizer, seed)
    limits = torch.tensor([sae.max_activation(j) or 0.0 for j in range(sae.d_sae)])
    counts = [DetectorCounts(sae.d_sae, len(DOMAINS)) for _ in THRESHOLDS]
    means = _Means(sae, len(DOMAINS))
    for x, holds in _batches(reader, first, truth):
        f = sae.encode(x)
        for share, count in zip(THRESHOLDS, counts, strict=True):
            count.update(f - share * limits, holds)
        means.update(x, f, holds)
    precision, recall, f1 = (
        torch.stack(part) for part in zip(*(count.scores() for count in counts), strict=True)
    )
    best = f1.argmax(0, keepdim=True)
    threshold = torch.tensor(THRESHOLDS)[best[0]] * limits[:, None]
    precision, recall, f1 = (part.gather(0, best)[0] for part in (precision, recall, f1))
    return Detectors(precision, recall, f1, threshold, means.contribution())


class _Means:
    """Sums of activations and of the stream, inside and outside each domain."""

    def __init__(self, sae: Sae, domains: int) -> None:
        self._decoder = sae.rows(range(sae.d_sae)).decoder
        self._f = torch.zeros(2, domains, sae.d_sae)
        self._x = torch.zeros(2, domains, sae.d_in)
        self._n = torch.zeros(2, domains, 1)

    def update(self, x: Tensor, f: Tensor, holds: Tensor) -> None:
        for side, inside in enumerate((holds.T.float(), 1 - holds.T.float())):
            self._f[side] += inside @ f
            self._x[side] += inside @ x
            self._n[side] += inside.sum(1, keepdim=True)

    def contribution(self) -> Tensor:
        f, x = (total / self._n.clamp(min=1) for total in (self._f, self._x))
        difference = x[0] - x[1]
        along = difference @ self._decoder.T / difference.square().sum(1, keepdim=True).clamp(min=1e-12)
        return ((f[0] - f[1]) * along).T


def _truth(reader: ShardReader, first: int, tokenizer: Any, seed: int) -> Tensor:
    """[n, D] bool for rows `first`… of the harvest: whether the token belongs to the domain."""
    rows = reader[first : len(reader)]
    start, stop = int(rows.sequence.min()), int(rows.sequence.max()) + 1
    documents = islice(labelled_documents(seed, stop), start, stop)
    domains = [tokenise(document, tokenizer)[1] for document in documents]
    number = {domain: at for at, domain in enumerate(DOMAINS)}
    truth = torch.zeros(len(rows.tokens), len(DOMAINS), dtype=torch.bool)
    places = zip(rows.sequence.tolist(), rows.position.tolist(), strict=True)
    for row, (sequence, position) in enumerate(places):
        found = number.get(domains[sequence - start][position])
        if found is not None:
            truth[row, found] = True
    return truth


def _batches(reader: ShardReader, first: int, truth: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(truth), BATCH):
        holds = truth[start : start + BATCH]
        yield reader.activations(first + start, first + start + len(holds)).float(), holds
