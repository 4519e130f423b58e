"""AxBench's three axes of steering, computed: no language model is asked for its opinion.

Every axis runs from 0 to 2, as there. A continuation is always judged behind the original prompt and by the
unsteered model, whatever brought it about:

* concept: what a classifier of texts, or the caller's own labeller, says (see `ConceptJudge`);
* fluency: 2·min(1, PPL_u/PPL)·min(1, D/D_u), with the perplexity PPL of the continuation, the share D of its
  pairs of neighbouring tokens that are different ones, and both their means u over unsteered continuations.
  The second factor is there because endless repetition is unsurprising;
* instruct: 2·min(1, max(0, PMI/PMI_u)), where PMI = (log p(text | prompt) − log p(text))/tokens says how
  much the prompt foretells the continuation, and PMI_u is its mean over unsteered continuations.

What these leave out: whether the text is true, helpful, or answers an instruction in the sense that a judge
would grade. Scores are therefore comparable within one report and not with AxBench's published ones.

Source: Wu et al. 2025, arXiv:2501.17148, section 3 (axes, harmonic mean, strengths chosen on other prompts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .classifier import ConceptJudge
from .generation import nats
from .hooked import HookedModel

__all__ = ["Axes", "Baseline", "Reading", "mean_axes", "read", "score"]

# Below this the prompts say nothing of what follows, and the instruct axis would divide by noise.
LEAST_PMI = 0.01


@dataclass(frozen=True)
class Reading:
    """What the unsteered model makes of one continuation.

    Attributes:
        surprise: nats per token behind the prompt.
        pmi: nats per token by which the prompt makes it likelier.
        distinct: share of its pairs of neighbouring tokens that are different ones.
        text: the continuation.
    """

    surprise: float
    pmi: float
    distinct: float
    text: str


@dataclass(frozen=True)
class Baseline:
    """Means over unsteered continuations."""

    surprise: float
    pmi: float
    distinct: float

    @classmethod
    def of(cls, readings: Sequence[Reading]) -> Baseline:
        """Empty continuations are passed over; one that is not is needed."""
        full = [reading for reading in readings if not math.isnan(reading.surprise)]
        count = len(full)
        return cls(
            surprise=sum(reading.surprise for reading in full) / count,
            pmi=sum(reading.pmi for reading in full) / count,
            distinct=sum(reading.distinct for reading in full) / count,
        )


@dataclass(frozen=True)
class Axes:
    """0 to 2 each; `overall` is their harmonic mean, or the mean of such."""

    concept: float
    instruct: float
    fluency: float
    overall: float

    @classmethod
    def of(cls, concept: float, instruct: float, fluency: float) -> Axes:
        """One continuation's: any axis at 0 makes the whole 0."""
        parts = (concept, instruct, fluency)
        overall = 3 / sum(1 / part for part in parts) if min(parts) > 0 else 0.0
        return cls(concept, instruct, fluency, overall)


def read(
    model: HookedModel, prompts: Sequence[list[int]], continuations: Sequence[list[int]]
) -> list[Reading]:
    """Let the unsteered model read continuations behind their original prompts."""
    start = model.encode("", 1) or [model.pad]
    behind = nats(model, [*zip(prompts, continuations, strict=True)])
    alone = nats(model, [(start, continuation) for continuation in continuations])
    return [
        Reading(
            surprise=given,
            pmi=free - given,
            distinct=_distinct(continuation),
            text=model.tokenizer.decode(continuation, skip_special_tokens=True),
        )
        for given, free, continuation in zip(behind, alone, continuations, strict=True)
    ]


def score(readings: Sequence[Reading], baseline: Baseline, judge: ConceptJudge, label: str) -> list[Axes]:
    """The axes of each continuation for one concept; an empty continuation scores 0 on all."""
    concepts = judge([reading.text for reading in readings], label)
    return [
        Axes.of(0.0, 0.0, 0.0)
        if math.isnan(reading.surprise)
        else Axes.of(concept, _instruct(reading, baseline), _fluency(reading, baseline))
        for reading, concept in zip(readings, concepts, strict=True)
    ]


def mean_axes(axes: Sequence[Axes]) -> Axes:
    """The mean of each axis, and of the overall scores."""
    count = len(axes)
    return Axes(
        concept=sum(one.concept for one in axes) / count,
        instruct=sum(one.instruct for one in axes) / count,
        fluency=sum(one.fluency for one in axes) / count,
        overall=sum(one.overall for one in axes) / count,
    )


def _fluency(reading: Reading, baseline: Baseline) -> float:
    likely = math.exp(min(0.0, baseline.surprise - reading.surprise))
    return 2 * likely * min(1.0, reading.distinct / max(baseline.distinct, 1e-9))


def _instruct(reading: Reading, baseline: Baseline) -> float:
    return 2 * min(1.0, max(0.0, reading.pmi / max(baseline.pmi, LEAST_PMI)))


def _distinct(ids: Sequence[int]) -> float:
    pairs = list(pairwise(ids))
    return len(set(pairs)) / len(pairs) if pairs else 1.0
