"""Choose by effect, not by score: the clamp that brings a domain about, and the ablation that ends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from demo.corpus.sentences import DOMAINS
from demo.detectors import Detectors
from demo.prompts import DOMAIN_PROMPTS, NEUTRAL_PROMPTS
from demo.steer import Steered, asks, share

__all__ = ["Clamp", "ablation", "choose_ablations", "choose_clamps", "clamp"]

# Multiples of a feature's recorded maximum.
STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
# With this share or more the likelier text wins: it keeps more of the model's own grammar.
GOOD = 0.85
# Ablations whose shares differ by less than this are alike.
CLOSE = 0.04
BY_SCORE, BY_DIFFERENCE = 4, 4
FINALISTS = 10
# A domain is spread over many features of a dictionary as fine as this one.
ABLATED = (1, 2, 4, 8, 16, 32, 48)


@dataclass(frozen=True, order=True)
class Clamp:
    """A feature held at `value` times its recorded maximum."""

    feature: int
    value: float

    def interventions(self) -> list[dict[str, Any]]:
        """As they stand in a request."""
        return clamp(self.feature, self.value)


def clamp(feature: int | str, value: float) -> list[dict[str, Any]]:
    """Interventions that hold one feature at `value` times its recorded maximum, on every token."""
    return [{"feature": feature, "op": "clamp", "value": value, "unit": "max"}]


def ablation(features: list[int]) -> list[dict[str, Any]]:
    """Interventions that take features away, on every token."""
    return [{"feature": feature, "op": "ablate"} for feature in features]


def choose_clamps(steered: Steered, detectors: Detectors) -> dict[str, Clamp]:
    """The best single-feature clamp of each domain.

    A first round tries every candidate at every strength once per prompt; a second one measures the best
    again, and of those that are good enough takes the one whose text the unsteered model finds likeliest.
    """
    first = sorted(
        (domain, Clamp(feature, value))
        for domain in DOMAINS
        for feature in candidates(detectors, domain)
        for value in STRENGTHS
    )
    shares = steered.shares(
        {(domain, found): (domain, asks(NEUTRAL_PROMPTS, found.interventions())) for domain, found in first}
    )
    return {domain: _most_fluent(steered, domain, _finalists(shares, domain)) for domain in DOMAINS}


def choose_ablations(steered: Steered, detectors: Detectors) -> dict[str, list[int]]:
    """For each domain the fewest of its carriers whose ablation is nearly as good as any number's."""
    wanted = {
        (domain, count): (domain, asks(DOMAIN_PROMPTS[domain], ablation(features), samples=3))
        for domain in DOMAINS
        for count in ABLATED
        if len(features := detectors.carriers(domain, count)) == count
    }
    shares = steered.shares(wanted)
    chosen: dict[str, list[int]] = {}
    for domain in DOMAINS:
        left = {count: value for (name, count), value in shares.items() if name == domain}
        fewest = min(count for count, value in left.items() if value <= min(left.values()) + CLOSE)
        chosen[domain] = detectors.carriers(domain, fewest)
    return chosen


def candidates(detectors: Detectors, domain: str) -> list[int]:
    """Features worth trying: the best detectors, and those that carry most of the mean difference."""
    return list(
        dict.fromkeys([*detectors.best(domain, BY_SCORE), *detectors.carriers(domain, BY_DIFFERENCE)])
    )


def _finalists(shares: Mapping[tuple[str, Clamp], float], domain: str) -> list[Clamp]:
    own = {found: value for (name, found), value in shares.items() if name == domain}
    return sorted(own, key=lambda found: (-min(own[found], GOOD), found.value))[:FINALISTS]


def _most_fluent(steered: Steered, domain: str, finalists: list[Clamp]) -> Clamp:
    shares: dict[Clamp, float] = {}
    surprise: dict[Clamp, float] = {}
    for found in finalists:
        wanted = asks(NEUTRAL_PROMPTS, found.interventions(), samples=4)
        texts = steered.texts(wanted)
        shares[found], surprise[found] = share(texts, domain), steered.surprise(wanted, texts)
    enough = min(GOOD, max(shares.values()))
    return min((found for found in finalists if shares[found] >= enough), key=lambda found: surprise[found])
