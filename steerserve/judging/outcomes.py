"""What is tried to steer a model, and how it came out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from torch import Tensor

from .axes import Axes, Baseline, mean_axes

__all__ = ["SAE", "STRENGTHS", "WRONG", "Candidate", "Lead", "Outcome", "Steering", "SteeringSettings"]

# Multiples of the largest activation (or projection) on record. A probe's normal lies where the stream varies
# little, so that it needs the largest.
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
SAE, WRONG = "sae", "wrong sign"


@dataclass(frozen=True, eq=False)
class Candidate:
    """Something to add to the stream.

    Attributes:
        method: "sae", "random feature", "diffmean" or "probe".
        unit: [d] float32, what strength 1 adds.
        feature: its index, if it is a feature.
    """

    method: str
    unit: Tensor
    feature: int | None = None


@dataclass(frozen=True)
class SteeringSettings:
    """How steering is tried.

    Attributes:
        strengths: multiples of each candidate's unit.
        tokens: how many each continuation has. temperature, seed: of the sampling; 0 is greedy.
    """

    strengths: tuple[float, ...] = STRENGTHS
    tokens: int = 24
    temperature: float = 0.8
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """One method's scores for one concept, on prompts that chose nothing.

    Attributes:
        strength: the multiple that scored best on the other prompts; None where there is none to choose.
        feature: of the SAE's methods. axes: means over prompts. sample: one prompt and continuation.
    """

    label: str
    method: str
    strength: float | None
    feature: int | None
    axes: Axes
    sample: tuple[str, str]


@dataclass(frozen=True)
class Lead:
    """Attributes:
    mean: of the differences over concepts. interval: half of their mean's 95 % interval by Student's t;
        NaN for a single concept.
    """

    mean: float
    interval: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> Lead:
        """Args: differences: of the overall scores, one for each concept."""
        from scipy.stats import t

        count = len(differences)
        if count < 2:
            return cls(differences[0], math.nan)
        return cls(mean(differences), float(t.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count))


@dataclass(frozen=True)
class Steering:
    """Attributes:
    outcomes: of every concept and method.
    trials: on the choosing prompts, (method, strength) → mean axes over concepts, each concept by the
        candidate that scored best at that strength.
    baseline: what unsteered continuations are like.
    prompts: how many measured.
    """

    outcomes: list[Outcome]
    trials: dict[tuple[str, float], Axes]
    baseline: Baseline
    prompts: int

    def by_method(self) -> dict[str, Axes]:
        """Means over concepts."""
        names = dict.fromkeys(outcome.method for outcome in self.outcomes)
        return {
            name: mean_axes([outcome.axes for outcome in self.outcomes if outcome.method == name])
            for name in names
        }

    def leads(self) -> dict[str, Lead]:
        """How far the SAE's overall score is ahead of every other method's, pairing them by concept."""
        scores = {(one.method, one.label): one.axes.overall for one in self.outcomes}
        labels = [one.label for one in self.outcomes if one.method == SAE]
        others = [name for name in self.by_method() if name != SAE]
        return {
            name: Lead.of([scores[SAE, label] - scores[name, label] for label in labels]) for name in others
        }
