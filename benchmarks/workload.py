"""What one turn asks of an engine: a batch of prompts of random tokens, and the plan of each request."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ENGINES", "VARIANTS", "Batch", "Load", "Variant", "draw_plan", "make_batch", "sae_name"]

# Below this lie the special tokens of the demo's tokenizer.
FIRST_TOKEN = 16
# Engine → layers that have an SAE; none means that the plugin is not loaded.
ENGINES = {"stock": 0, "control": 0, "plugin": 1, "layers16": 16}


def sae_name(index: int) -> str:
    """The name under which the SAE of a shape's layer `index` is served."""
    return f"bench{index}"


@dataclass(frozen=True)
class Load:
    """The size of a turn: `batches` batches, one after another, of `requests` requests each."""

    requests: int = 64
    prompt: int = 64
    output: int = 48
    rows: int = 8
    batches: int = 1


@dataclass(frozen=True)
class Variant:
    """One way of serving the same load: by which engine, and with how many distinct plans in the batch."""

    name: str
    engine: str
    plans: int = 0
    report: bool = False

    @property
    def hooked(self) -> int:
        """Layers that have an SAE."""
        return ENGINES[self.engine]

    def rows(self, load: Load) -> int:
        """Rows of each plan: what the load says, and at least one at every hooked layer."""
        return max(load.rows, self.hooked) if self.plans else 0

    def steered(self, load: Load) -> int:
        """Tokens × rows that a turn must count: all but each last token, which is never computed."""
        return load.batches * load.requests * self.rows(load) * (load.prompt + load.output - 1)


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
    Variant("one", "plugin", plans=1),
    Variant("many64", "plugin", plans=64),
    Variant("reports64", "plugin", plans=64, report=True),
    Variant("layers16", "layers16", plans=64),
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
    rows, report = variant.rows(load), variant.report
    plans = [draw_plan(drawing, rows, variant.hooked, d_sae, report=report) for _ in range(variant.plans)]
    steering: list[dict[str, Any] | None] = [plans[i % len(plans)] for i in range(load.requests)]
    return Batch(prompts, steering, load.output, report)


def draw_plan(rng: random.Random, rows: int, hooked: int, d_sae: int, *, report: bool) -> dict[str, Any]:
    """A `steering` object of `rows` clamps, spread evenly over `hooked` SAEs, on every token."""
    # Special tokens too, so that the number of steered tokens is known whatever the model says.
    interventions = [
        {
            "sae": sae_name(i % hooked),
            "feature": feature,
            "op": "clamp",
            "value": round(rng.uniform(2.0, 10.0), 3),
            "where": {"special_tokens": True},
        }
        for i, feature in enumerate(rng.sample(range(d_sae), rows))
    ]
    return {"interventions": interventions, "report": report}
