"""Choose by effect, not by score: the clamp that makes a neutral prompt a domain's, the ablation that ends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from demo.corpus.sentences import DOMAINS
from demo.detectors import Detectors
from demo.prompts import DOMAIN_PROMPTS, NEUTRAL_PROMPTS
from demo.steer import Steered, asks

__all__ = ["Clamp", "ablation", "choose_ablations", "choose_clamps", "clamp"]

# Multiples of a feature's recorded maximum.
STRENGTHS = (0.6, 0.9, 1.2, 1.6, 2.0)
# Within this of the best share, the gentler clamp wins: it leaves more of the model's own grammar.
CLOSE = 0.02
BY_SCORE, BY_DIFFERENCE = 3, 3
FINALISTS = 3
ABLATED = (1, 2, 4, 8, 16)


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


def choose_clamps(steered: Steered, detectors: Detectors) -> dict[str, tuple[Clamp, float]]:
    """The best single-feature clamp of each domain with its share on neutral prompts.

    A first round tries every candidate at every strength once per prompt; a second one measures the best
    again, so that the winner is not the luckiest.
    """
    first = {
        (domain, Clamp(feature, value))
        for domain in DOMAINS
        for feature in candidates(detectors, domain)
        for value in STRENGTHS
    }
    shares = _clamp_shares(steered, first, samples=1)
    finalists = {(domain, found) for domain in DOMAINS for found in _finalists(shares, domain)}
    return {
        domain: _gentlest({found: value for (name, found), value in measured.items() if name == domain})
        for measured in (_clamp_shares(steered, finalists, samples=4),)
        for domain in DOMAINS
    }


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
        fewest = min(count for count, value in left.items() if value <= min(left.values()) + 2 * CLOSE)
        chosen[domain] = detectors.carriers(domain, fewest)
    return chosen


def candidates(detectors: Detectors, domain: str) -> list[int]:
    """Features worth trying: the best detectors, and those that carry most of the mean difference."""
    return list(
        dict.fromkeys([*detectors.best(domain, BY_SCORE), *detectors.carriers(domain, BY_DIFFERENCE)])
    )


def _clamp_shares(
    steered: Steered, wanted: set[tuple[str, Clamp]], samples: int
) -> dict[tuple[str, Clamp], float]:
    ordered = sorted(wanted)
    return steered.shares(
        {
            (domain, found): (domain, asks(NEUTRAL_PROMPTS, found.interventions(), samples=samples))
            for domain, found in ordered
        }
    )


def _finalists(shares: Mapping[tuple[str, Clamp], float], domain: str) -> list[Clamp]:
    own = {found: value for (name, found), value in shares.items() if name == domain}
    return sorted(own, key=lambda found: (-own[found], found.value))[:FINALISTS]


def _gentlest(shares: Mapping[Clamp, float]) -> tuple[Clamp, float]:
    best = max(shares.values())
    winner = min((found for found, value in shares.items() if value >= best - CLOSE), key=lambda c: c.value)
    return winner, shares[winner]
