"""Conditions that hold on, and conditions at earlier layers, in a real engine, against HF and SAELens."""

from __future__ import annotations

from typing import Any

import torch
from vllm import SamplingParams

from tests.support.combinations import both_runners, combination
from tests.support.engine import Engine, random_prompts

# Prompts are cut into chunks of at most 48 tokens, and share the step with others.
pytestmark = both_runners(slow_v2=True)

PUSH: dict[str, Any] = {"sae": "jump", "feature": 3, "op": "add", "value": 6.0}


def record(engine: Engine, prompt: list[int], sae: str, feature: int, at: float) -> float:
    """A bound that the feature first exceeds about `at` of the way through a prompt."""
    f = engine.reference.activations(prompt, len(prompt), sae, feature)
    f[0] = 0.0  # the special token, which no window includes
    highs = [p for p in range(1, len(f)) if f[p] > f[:p].max() + 0.02]
    assert highs
    p = min(highs, key=lambda place: abs(place - at * len(f)))
    return float((f[p] + f[:p].max()) / 2)


@combination("`latch`")
def test_a_latched_row_goes_on_after_its_condition(engine: Engine) -> None:
    prompts = random_prompts(6, [30, 90, 120], seed=71)
    plans = []
    for i, prompt in enumerate(prompts):
        bound = record(engine, prompt, "jump", 10 + i, at=0.5)
        when = {"feature": 10 + i, "above": bound}
        plans.append([{**PUSH, "latch": True, "when": when}])
    once = [[{**plan[0], "latch": False}] for plan in plans]
    replies = engine.generate(prompts, plans)
    engine.check(prompts, plans, replies)
    engine.check(prompts, once, engine.generate(prompts, once))
    # Read again, it must be computed again: what happened in a cached prompt nobody knows.
    again = engine.generate(prompts, plans)
    engine.check(prompts, plans, again)
    assert [reply.cached for reply in again] == [0] * len(prompts)
    assert [reply.tokens for reply in again] == [reply.tokens for reply in replies]


@combination("conditions at an earlier layer")
def test_a_condition_is_read_where_its_feature_is(engine: Engine) -> None:
    prompts = random_prompts(6, [20, 70, 110], seed=72)
    plans = []
    for i, prompt in enumerate(prompts):
        bound = record(engine, prompt, "std", 5 + i, at=0.3)
        late = {"sae": "batch", "feature": 7 + i, "op": "clamp", "value": 4.0}
        when = [{"sae": "std", "feature": 5 + i, "above": bound / 2}, {"feature": 40, "below": 50.0}]
        plans.append([{**late, "when": when, "latch": i % 2 == 1}, {**PUSH, "feature": 20 + i}])
    engine.check(prompts, plans, engine.generate(prompts, plans))


@combination('`then: "abort"`')
def test_a_request_ends_where_its_condition_first_holds(engine: Engine) -> None:
    prompts = random_prompts(8, [20, 75, 100], seed=73)
    whole = engine.generate(prompts, [[PUSH]] * 8, max_tokens=24)
    plans, expected = [], []
    for i, (prompt, reply) in enumerate(zip(prompts, whole, strict=True)):
        ids = [*prompt, *reply.tokens[:-1]]
        sae, feature = ("jump", 30 + i) if i % 2 else ("std", 30 + i)
        f = engine.reference.activations(ids, len(prompt), sae, feature, [PUSH])
        f[[at for at, token in enumerate(ids) if token in engine.reference.special]] = 0.0
        start = 1 if i < 3 else len(prompt)
        later = max(range(start, len(f)), key=lambda p: float(f[p] - f[:p].max()))
        bound = float((f[later] + f[:later].max()) / 2)
        fires = torch.nonzero(f > bound)[:, 0].tolist()
        plans.append([PUSH, {"then": "abort", "when": {"sae": sae, "feature": feature, "above": bound}}])
        expected.append(reply.tokens[: max(0, fires[0] + 1 - len(prompt))] if fires else reply.tokens)
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=24, ignore_eos=True, extra_args={"steering": {"interventions": plan}}
        )
        for plan in plans
    ]
    outputs = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in outputs] == expected
    ended = [len(tokens) < 24 for tokens in expected]
    assert sum(ended) >= 6
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons == ["content_filter" if end else "length" for end in ended]
    assert {output.outputs[0].stop_reason for output in outputs} == {None}
