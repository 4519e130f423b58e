"""Everything that labelled texts say about an SAE: probing, splitting, absorption, TPP and MS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steerserve.errors import ConfigError

from .absorption import Absorption, judge_absorption
from .activations import SparseActivations
from .concepts import Concept, Half, best_features, detector_f1, judge_concepts
from .judged import Judged
from .monosemanticity import monosemanticity
from .probe import LinearProbe, fit_probes
from .texts import TokenTable
from .tpp import Perturbation, judge_tpp

__all__ = ["Labelled", "Prepared", "judge_labelled", "prepare"]


# Absorption is judged on as many of a concept's tokens, evenly spaced, as fit into 256 MiB.
_NUMBERS_AT_ONCE = 2**26
_LEAST_TOKENS = 256


@dataclass(frozen=True, eq=False)
class Prepared:
    """Labelled tokens in two halves, and the linear probes that SAEs are compared with.

    Attributes:
        choose, measure: what probes, features and thresholds are chosen on, and what they are measured on.
        probe: of single tokens. text_probe: of the mean of a text's tokens.
        embeddings: [T, e] of the measured texts, from outside the language model.
    """

    choose: TokenTable
    measure: TokenTable
    probe: LinearProbe
    text_probe: LinearProbe
    embeddings: Tensor


@dataclass(frozen=True, eq=False)
class Labelled:
    """Attributes:
    concepts: one for each label. absorption: likewise, in their order.
    tpp: by the number of latents that are taken away.
    monosemanticity: [F] float64, NaN where a feature fires too seldom.
    similarity: the mean similarity of two texts, which a feature that fires at random would score.
    maxima: [F] float32, over the choosing half. f1: [F, L], there.
    """

    concepts: list[Concept]
    absorption: list[Absorption]
    tpp: dict[int, Perturbation]
    monosemanticity: Tensor
    similarity: float
    maxima: Tensor
    f1: Tensor

    def candidates(self, label: int, count: int) -> list[int]:
        """The features to try steering with: the best detectors of a label."""
        return best_features(self.f1, label, count)

    def random_feature(self, label: int, generator: torch.Generator) -> int:
        """A feature that is alive and no good detector of the label: none of its 16 best."""
        alive = self.maxima > 0
        alive[best_features(self.f1, label, 16)] = False
        pool = alive.nonzero()[:, 0] if alive.any() else torch.arange(len(self.maxima))
        return int(pool[int(torch.randint(len(pool), (1,), generator=generator))])


def prepare(choose: TokenTable, measure: TokenTable, embeddings: Tensor) -> Prepared:
    """Fit the probes.

    Args: embeddings: [T, e], of the texts of `measure`.
    Raises: ConfigError if a label has no token in one of the halves.
    """
    for table in (choose, measure):
        counts = torch.bincount(table.label, minlength=len(table.labels))
        if missing := [label for label, count in zip(table.labels, counts, strict=True) if count == 0]:
            raise ConfigError(f"expected tokens of every label, got none of {missing} (take more tokens)")
    number = torch.arange(len(choose.labels))
    text_truth = choose.text_label().unsqueeze(1) == number
    return Prepared(
        choose,
        measure,
        fit_probes(choose.x, choose.truth()),
        fit_probes(choose.pooled(), text_truth),
        embeddings[: measure.texts],
    )


def judge_labelled(judged: Judged, data: Prepared, progress: Callable[[int], None] | None = None) -> Labelled:
    """Judge one SAE on labelled tokens. Args: progress: told how many tokens each part had."""
    choose, measure = (_half(judged, data, table, progress) for table in (data.choose, data.measure))
    labels = data.choose.labels
    concepts = judge_concepts(choose, measure, labels)
    decoder = judged.decoder.cpu()
    tpp = judge_tpp(
        (choose.pooled, choose.text_label),
        (measure.pooled, data.measure.pooled(), measure.text_label),
        decoder,
        data.text_probe,
    )
    texts = data.measure
    return Labelled(
        concepts,
        [_absorption(data, measure, decoder, at, concept) for at, concept in enumerate(concepts)],
        tpp,
        monosemanticity(measure.activations.pooled_max(texts.text, texts.texts), data.embeddings),
        _mean_similarity(data.embeddings),
        choose.activations.maxima(),
        detector_f1(choose, len(labels)),
    )


def _half(judged: Judged, data: Prepared, table: TokenTable, progress: Callable[[int], None] | None) -> Half:
    activations = SparseActivations.of(judged, table.x, progress)
    return Half(
        activations,
        table.label,
        activations.pooled_mean(table.text, table.texts),
        table.text_label(),
        data.probe.scores(table.x),
        data.text_probe.scores(table.pooled()),
    )


def _absorption(data: Prepared, half: Half, decoder: Tensor, at: int, concept: Concept) -> Absorption:
    found = ((half.label == at) & (half.scores[:, at] > 0)).nonzero()[:, 0]
    most = max(_LEAST_TOKENS, _NUMBERS_AT_ONCE // len(decoder))
    found = found[:: max(1, -(-len(found) // most))]
    return judge_absorption(
        half.activations.dense(found), data.measure.x[found], decoder, data.probe.weight[at], concept.main
    )


def _mean_similarity(embeddings: Tensor) -> float:
    count = len(embeddings)
    unit = embeddings.double()
    unit = unit / unit.norm(dim=1, keepdim=True).clamp(min=1e-12)
    both = float(unit.sum(0).square().sum() - unit.square().sum())
    return both / max(count * (count - 1), 1)
