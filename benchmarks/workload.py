"""What one turn asks of an engine: a batch of prompts of random tokens, and the plan of each request."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["VARIANTS", "Batch", "Load", "Variant", "make_batch"]

# Below this lie the special tokens of the demo's tokenizer.
FIRST_TOKEN = 16
SAE_NAME = "bench"


@dataclass(frozen=True)
class Variant:
    """One way of serving the same load: by which engine, and with how many distinct plans in the batch."""

    name: str
    engine: str
    plans: int = 0
    report: bool = False


@dataclass(frozen=True)
class Load:
    """The size of a turn: `batches` batches, one after another, of `requests` requests each."""

    requests: int = 32
    prompt: int = 64
    output: int = 48
    rows: int = 8
    batches: int = 1

    @property
    def steered(self) -> int:
        """Tokens × rows that a steered turn must count: all but each last token, which is never computed."""
        return self.batches * self.requests * self.rows * (self.prompt + self.output - 1)


@dataclass(frozen=True)
class Batch:
    """Prompts, and for each request its `steering` (or None); plain values, for they travel as JSON."""

    prompts: list[list[int]]
    steering: list[dict[str, Any] | None]
    output: int
    report: bool

    @property
    def wire(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


VARIANTS = (
    Variant("stock", "stock"),
    Variant("control", "control"),
    Variant("idle", "plugin"),
    Variant("one_plan", "plugin", plans=1),
    Variant("plans_32", "plugin", plans=32),
    Variant("reported", "plugin", plans=32, report=True),
)


def make_batch(variant: Variant, load: Load, *, vocab: int, d_sae: int, seed: str) -> Batch:
    """A batch that no other seed repeats, so that the prefix cache, which is on, never has any of it.

    Args:
        vocab: prompts are drawn from the model's ordinary tokens.
        d_sae: plans are drawn from the SAE's features.
    """
    rng = random.Random(seed)
    prompts = [[rng.randrange(FIRST_TOKEN, vocab) for _ in range(load.prompt)] for _ in range(load.requests)]
    if not variant.plans:
        return Batch(prompts, [None] * load.requests, load.output, report=False)
    # Plans are the same in every round, as an application's are.
    drawing = random.Random(variant.name)
    plans = [_plan(drawing, load.rows, d_sae, variant.report) for _ in range(variant.plans)]
    steering: list[dict[str, Any] | None] = [plans[i % len(plans)] for i in range(load.requests)]
    return Batch(prompts, steering, load.output, variant.report)


def _plan(rng: random.Random, rows: int, d_sae: int, report: bool) -> dict[str, Any]:
    # Special tokens too, so that the number of steered tokens is known whatever the model says.
    interventions = [
        {
            "sae": SAE_NAME,
            "feature": feature,
            "op": "clamp",
            "value": round(rng.uniform(0.5, 2.0), 3),
            "where": {"special_tokens": True},
        }
        for feature in rng.sample(range(d_sae), rows)
    ]
    return {"interventions": interventions, "report": report}
