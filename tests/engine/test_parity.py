"""The served model against HF transformers with hooks and SAELens' encode and decode, in float32."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest

from tests.support.combinations import V1, V2
from tests.support.engine import Engine, Reply, random_prompts
from tests.support.reference import Steering
from tests.support.scale import REST, scaled

T = TypeVar("T")

SAES = ["std", "jump", "gate", "batch", "first"]
OPS: list[dict[str, Any]] = [
    {"op": "clamp", "value": 6.0},
    {"op": "ablate"},
    {"op": "scale", "value": -2.5},
    {"op": "add", "value": 3.0},
    {"op": "at_least", "value": 4.0},
    {"op": "at_most", "value": 0.5},
]
WHERE: list[dict[str, Any]] = [
    {"phase": "prompt"},
    {"phase": "generation"},
    {"start": 3, "stop": 9},
    {"start": -4},
    {"phase": "generation", "start": 2, "stop": 5},
    {"phase": "prompt", "stop": -2},
    {"positions": [1, 4, -1, 40]},
    {"tokens": list(range(3, 120))},
    {"tokens": list(range(3, 200)), "positions": [2], "exclude_tokens": [5, 6, 7, 8, 9, 10, 11, 12]},
    {"exclude_positions": [-1, 2, 3], "exclude_tokens": list(range(100, 160))},
    {"special_tokens": True},
    {"special_tokens": True, "positions": [0]},
]


def _every_op() -> list[list[dict[str, Any]]]:
    return [[{"sae": sae, "feature": 7 + i, **op}] for sae in SAES for i, op in enumerate(OPS)]


def _windows() -> list[list[dict[str, Any]]]:
    return [[{"sae": "jump", "feature": 3, "op": "clamp", "value": 9.0, "where": w}] for w in WHERE]


def _conditions() -> list[list[dict[str, Any]]]:
    base = {"sae": "jump", "feature": 11, "op": "add", "value": 5.0}
    return [
        [{**base, "only_if_active": True}],
        [{**base, "when": {"feature": 12, "above": 0.5}}],
        [{**base, "when": {"feature": 12, "below": 0.5}}],
        [{**base, "when": [{"feature": 12, "above": 0.1}, {"sae": "gate", "feature": 5, "below": 2.0}]}],
        [{**base, "when": {"feature": 14, "above": 0.5, "below": 4.0}, "where": {"phase": "generation"}}],
    ]


def _together() -> list[list[dict[str, Any]]]:
    direction = {"direction": "north", "value": 4.0}
    return [
        [{**direction, "op": "add"}],
        [{"direction": "north", "op": "ablate"}],
        [{**direction, "op": "clamp", "only_if_active": True}],
        [{"sae": sae, "feature": f, "op": "clamp", "value": 3.0} for sae in SAES for f in (1, 2, 3)],
        [
            {"sae": "gate", "feature": 9, "op": "scale", "value": 3.0},
            {"sae": "jump", "feature": 9, "op": "ablate"},
            {"direction": "north", "op": "at_most", "value": -1.0},
        ],
        [],
    ]


def _trained() -> list[Steering]:
    """SAEs without an encoder row of each feature; their plain formulas are in tests/support/plain.py."""
    plans: list[Steering] = []
    for sae in ("switch", "kron", "vaease"):
        rows = [{"sae": sae, "feature": 9 * i, **OPS[i % 6]} for i in range(12)]
        plans += [
            rows,
            {"interventions": rows[:4], "error": "drop"},
            [{**rows[3], "only_if_active": True}, {**rows[4], "when": {"feature": 77, "below": 0.2}}],
        ]
    return plans


def _dense() -> list[Steering]:
    """What needs a whole SAE: exact top-k (k = 50 of 4096), layer norm, and dropping the error."""
    top = [{"sae": "top", "feature": 83 * i, **OPS[i % 6]} for i in range(12)]
    norm = [{"sae": "norm", "feature": 5 * i, **OPS[i % 6]} for i in range(12)]
    jump = {"sae": "jump", "feature": 3, "op": "add", "value": 2.0}
    early = {"where": {"phase": "prompt", "stop": -2}}
    return [
        top,
        norm,
        [{**top[3], "only_if_active": True}, {**top[4], "when": {"feature": 77, "above": 0.0}}],
        [{**jump, "when": {"sae": "norm", "feature": 9, "above": 0.1}}],
        [*top[:3], *norm[:3], jump],
        {"interventions": top[:4], "error": "drop"},
        {"interventions": norm[:4], "error": "drop"},
        {"interventions": [*top[:2], *norm[:2]], "error": "drop"},
        {"interventions": [{**norm[0], **early}, {"direction": "north", "op": "add", "value": 2.0}],
         "error": "drop"},
        {"interventions": [{**top[1], "op": "scale", "value": 1.0, "only_if_active": True}], "error": "drop"},
    ]  # fmt: skip


def _differ(one: Reply, other: Reply) -> bool:
    pairs = zip(one.logprobs, other.logprobs, strict=True)
    return one.tokens != other.tokens or any(abs(a - b) > 1e-3 for a, b in pairs)


OTHERS = ["gemma2", "gpt2", "qwen3", "olmo2"]


# Shorter than a block, and longer than three prefill chunks.
LENGTHS = [1, 5, 12, 17, 33, 60, 110, 150]


def _share(engine: Engine, whole: list[T], one_of: int = 4) -> list[T]:
    """What an interpreter may take its time for now; all of it where nothing is interpreted."""
    if not engine.is_interpreted:
        return whole
    return [each for number, each in enumerate(whole) if (number % one_of > 0) == REST]


@pytest.mark.parametrize(
    "engine",
    [
        V1,
        *(pytest.param({"family": family}, marks=pytest.mark.slow) for family in OTHERS),
        pytest.param(V2, marks=scaled),
    ],
    indirect=True,
    ids=["llama", *OTHERS, "llama-v2"],
)
class TestParity:
    def test_every_op_architecture_window_and_condition_matches_a_hook_with_saelens(
        self, engine: Engine
    ) -> None:
        plans = [*_every_op(), *_windows(), *_conditions(), *_together(), *_dense(), *_trained()]
        steering = _share(engine, plans)
        prompts = random_prompts(len(steering), LENGTHS, seed=1)
        replies = engine.generate(prompts, steering)
        worst = engine.check(prompts, steering, replies)
        print(f"\nlargest logprob difference: {worst:.2e} over {len(steering)} plans")

    def test_an_unsteered_request_beside_steered_ones_does_not_change(self, engine: Engine) -> None:
        prompts = _share(engine, random_prompts(24, LENGTHS, seed=2), 3)
        plans = [*_every_op(), *_together()]
        mixed = [plans[i] if i % 2 else None for i in range(len(prompts))]
        engine.llm.reset_prefix_cache()
        alone = engine.generate(prompts, [None] * len(prompts))
        engine.llm.reset_prefix_cache()
        beside = engine.generate(prompts, mixed)
        changed = sum(_differ(a, b) for a, b in zip(alone[1::2], beside[1::2], strict=True))
        assert 2 * changed >= len(prompts) // 2, "the steered neighbours must really have been steered"
        for before, after in zip(alone[::2], beside[::2], strict=True):
            assert before.tokens == after.tokens
            assert before.logprobs == pytest.approx(after.logprobs, abs=1e-5)

    def test_operations_that_change_nothing_leave_the_tokens_alone(self, engine: Engine) -> None:
        prompts = _share(engine, random_prompts(12, LENGTHS, seed=3))
        nothing = [
            {"op": "scale", "value": 1.0},
            {"op": "add", "value": 0.0},
            {"op": "at_least", "value": 0.0},
        ]
        plans = [[{"sae": SAES[i % 5], "feature": i, **nothing[i % 3]}] for i in range(len(prompts))]
        plain = engine.generate(prompts, [None] * len(prompts))
        steered = engine.generate(prompts, plans)
        assert [r.tokens for r in plain] == [r.tokens for r in steered]
