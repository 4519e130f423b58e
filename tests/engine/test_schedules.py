"""Schedules that recompute, reject or split tokens: steering means the same under all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from steerserve.report import merge_workers
from tests.support.combinations import both_runners, combination
from tests.support.engine import Engine, random_prompts
from tests.support.lora import make_adapter, merge_adapter
from tests.support.models import BOS, EOS, PAD

# Each needs an engine of its own.
pytestmark = pytest.mark.slow

PLAN: list[dict[str, Any]] = [
    {"sae": "jump", "feature": 3, "op": "clamp", "value": 4.0},
    {"sae": "std", "feature": 4, "op": "add", "value": 2.0, "where": {"phase": "generation"}},
]


def _counts(engine: Engine, tickets: list[str]) -> list[list[int]]:
    """Tokens of each request's rows, computed or cached; PLAN's first row stands at the later point."""
    tallies = engine.collect(*tickets)["tallies"]
    return [[cached + tokens for cached, _, tokens, *_ in reversed(tallies[ticket][0])] for ticket in tickets]


def _ordinary(tokens: list[int]) -> int:
    """How many are not special: those alone are steered, whatever the model came up with."""
    return sum(token not in (BOS, EOS, PAD) for token in tokens)


def _counter(engine: Engine, name: str) -> float:
    return sum(metric.value for metric in engine.llm.get_metrics() if metric.name == name)


@combination("forced preemption", "chunked prefill")
@both_runners({"family": "llama", "num_gpu_blocks_override": 14}, "scarce-cache")
def test_preempted_and_resumed_requests_are_steered_and_counted_once(engine: Engine) -> None:
    prompts = random_prompts(8, [60], seed=41)
    tickets = [f"preempted-{i}" for i in range(8)]
    replies = engine.generate(prompts, [PLAN] * 8, tickets, max_tokens=60)
    assert _counter(engine, "vllm:num_preemptions") > 0
    engine.check(prompts, [PLAN] * 8, replies)
    # 60 ordinary prompt tokens and what was fed back; generation starts at the last prompt token.
    fed = [_ordinary(reply.tokens[:-1]) for reply in replies]
    assert _counts(engine, tickets) == [[60 + n, 1 + n] for n in fed]


@combination("n-gram speculation")
@both_runners(
    {
        "family": "llama",
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
    },
    "ngram",
)
def test_speculated_tokens_are_steered_and_rejected_ones_not_counted(engine: Engine) -> None:
    pattern = [5, 6, 7, 8, 9, 10]
    prompts = [[0, *pattern * 6], [0, *reversed(pattern * 5)]]
    tickets = ["s0", "s1"]
    replies = engine.generate(prompts, [PLAN] * 2, tickets, max_tokens=40)
    assert _counter(engine, "vllm:spec_decode_num_draft_tokens") > 0
    engine.check(prompts, [PLAN] * 2, replies)
    for (whole, generated), prompt, reply in zip(_counts(engine, tickets), prompts, replies, strict=True):
        fed = _ordinary(reply.tokens[:-1])
        # Drafts of the last step that stand count, and nobody said here at which of them the reply ended.
        assert len(prompt) - 1 + fed <= whole <= len(prompt) - 1 + fed + 3
        assert whole - generated == len(prompt) - 2


@combination("tensor parallelism (TP = 2)")
@both_runners({"family": "llama", "tensor_parallel_size": 2}, "tp2")
def test_two_tensor_parallel_ranks_serve_what_one_does(engine: Engine) -> None:
    _check_ranks(engine)


# V1 is not eager, for stock vLLM 0.32 on CPU sizes the stages' buffers in its warm-up only. V2 is, for
# what Triton's interpreter runs cannot be compiled.
@combination("pipeline parallelism (PP = 2)")
@both_runners(
    {"family": "llama", "pipeline_parallel_size": 2, "enforce_eager": False}, "pp2", enforce_eager=True
)
def test_two_pipeline_stages_serve_what_one_does(engine: Engine) -> None:
    _check_ranks(engine)


def _check_ranks(engine: Engine) -> None:
    prompts = random_prompts(6, [10, 60, 110], seed=42)
    plans = [PLAN, None, PLAN[:1], None, PLAN[1:], PLAN]
    tickets = [f"rank{i}" for i in range(6)]
    replies = engine.generate(prompts, plans, tickets)
    engine.check(prompts, plans, replies)
    both = merge_workers(engine.llm.collective_rpc("steerserve_collect", args=(["rank0"],)))
    counted = sorted(row.tokens for row in both.tallies["rank0"].rows.values())
    fed = _ordinary(replies[0].tokens[:-1])
    assert counted == [1 + fed, len(prompts[0]) - 1 + fed]


@combination("LoRA")
@both_runners({"family": "llama", "enable_lora": True, "max_lora_rank": 8}, "lora")
def test_an_adapted_model_is_steered_like_the_merged_one(engine: Engine, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    prompts = random_prompts(4, [20, 60], seed=43)
    plans = [PLAN, None, PLAN[:1], PLAN[1:]]
    engine.check(prompts, plans, engine.generate(prompts, plans))
    lora = LoRARequest("tiny", 1, str(adapter))
    replies = engine.generate(prompts, plans, lora=lora)
    merge_adapter(engine.reference.model, adapter)
    engine.check(prompts, plans, replies)
