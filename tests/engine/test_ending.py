"""A request ends where a condition holds, and what its client sees does not depend on the schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from steerserve_vllm.ending import MARKER
from tests.support.combinations import both_runners, combination
from tests.support.engine import Engine, random_prompts

PLAN = {"interventions": [{"sae": "jump", "feature": 3, "op": "clamp", "value": 4.0}]}
OPTIONS = {"family": "llama"}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
LONG = random_prompts(1, [100], seed=61)[0]
SHORT = random_prompts(1, [20], seed=62)[0]
CYCLE = [5, 6, 7, 8, 9, 10]
PATTERN = [0, *CYCLE * 6]
REPEATED = (CYCLE * 3)[:16]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(engine: Engine) -> Iterator[None]:
    fire(engine)
    yield
    # Refused while a single block of the cache is in use.
    assert engine.llm.reset_prefix_cache()
    engine.llm.collective_rpc("hold_fire")


def fire(engine: Engine, expected: dict[str, list[int]] | None = None, **positions: list[int]) -> None:
    """Set where the next requests fire, all of whose tokens are computed."""
    engine.llm.reset_prefix_cache()
    engine.llm.collective_rpc("fire", args=(positions, expected or {}))


def params(ticket: str, **settings: Any) -> SamplingParams:
    default = {"temperature": 0.0, "max_tokens": 8, "logprobs": 0, "ignore_eos": True}
    extra = {"steering": PLAN, "steering_ticket": ticket}
    return SamplingParams(**(default | settings), extra_args=extra)


def generate(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[Any]:
    inputs = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    return engine.llm.generate(inputs, [sampling for _, sampling in requests], use_tqdm=False)


def one(engine: Engine, prompt: list[int], **settings: Any) -> Any:
    return generate(engine, [(prompt, params("t", **settings))])[0].outputs[0]


def tokens_of(sample: Any) -> list[int]:
    """The sample's tokens, once it is sure that their logprobs are those of the same tokens."""
    tokens = list(sample.token_ids)
    assert [next(iter(step)) for step in sample.logprobs] == tokens
    return tokens


def is_ended(sample: Any) -> bool:
    assert sample.finish_reason == "content_filter" or sample.finish_reason in ("length", "stop")
    assert sample.finish_reason != "content_filter" or sample.stop_reason is None
    return bool(sample.finish_reason == "content_filter")


def counter(engine: Engine, name: str) -> float:
    return sum(metric.value for metric in engine.llm.get_metrics() if metric.name == name)


@both_runners(slow_v2=True)
class TestEnding:
    def test_what_was_computed_from_there_on_is_read_from_the_cache_by_nobody(self, engine: Engine) -> None:
        fire(engine, t=[60])
        assert is_ended(one(engine, LONG))
        again = generate(engine, [(LONG, params("another"))])[0]
        assert not is_ended(again.outputs[0])
        # Of the 96 tokens that were computed, those of the blocks before the one that position 60 lies in.
        assert again.num_cached_tokens == 32

    @combination("ending a request", "chunked prefill")
    @pytest.mark.parametrize(("position", "computed"), [(0, 48), (20, 48), (60, 96), (100, 101)])
    def test_a_fire_in_the_prompt_delivers_nothing_and_the_rest_of_the_prompt_is_not_computed(
        self, engine: Engine, position: int, computed: int
    ) -> None:
        fire(engine, t=[position])
        sample = one(engine, LONG)
        assert is_ended(sample)
        assert (tokens_of(sample), sample.text) == ([], "")
        assert engine.llm.collective_rpc("computed")[0] == {"t": computed}

    @pytest.mark.parametrize("k", [0, 1, 5])
    def test_a_fire_on_a_generated_token_delivers_it_and_none_behind_it(self, engine: Engine, k: int) -> None:
        whole = tokens_of(one(engine, SHORT))
        fire(engine, t=[len(SHORT) + k])
        sample = one(engine, SHORT, min_tokens=8)
        assert is_ended(sample)
        assert tokens_of(sample) == whole[: k + 1]

    def test_the_earliest_of_several_fires_counts(self, engine: Engine) -> None:
        whole = tokens_of(one(engine, SHORT))
        fire(engine, t=[len(SHORT) + 4, len(SHORT) + 2, len(SHORT) + 3])
        assert tokens_of(one(engine, SHORT)) == whole[:3]

    def test_a_fire_in_the_step_that_reaches_max_tokens_wins_and_one_behind_it_never_comes(
        self, engine: Engine
    ) -> None:
        fire(engine, t=[len(SHORT) + 6])
        sample = one(engine, SHORT)
        assert (is_ended(sample), len(tokens_of(sample))) == (True, 7)
        fire(engine, t=[len(SHORT) + 7])
        sample = one(engine, SHORT)
        assert (sample.finish_reason, len(tokens_of(sample))) == ("length", 8)

    def test_a_stop_string_or_stop_token_at_the_fired_token_wins(self, engine: Engine) -> None:
        whole = one(engine, SHORT)
        token = whole.token_ids[3]
        fire(engine, t=[len(SHORT) + 3])
        stopped = one(engine, SHORT, stop=[f"w{token}"])
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", f"w{token}")
        stopped = one(engine, SHORT, stop_token_ids=[token])
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
        ended = one(engine, SHORT, stop=["no such text"])
        assert is_ended(ended)
        assert ended.text == "".join(whole.text.partition(f"w{token}")[:2])

    def test_a_stop_string_that_spells_the_marker_is_a_stop_string(self, engine: Engine) -> None:
        sample = one(engine, SHORT, stop=[MARKER])
        assert sample.finish_reason == "length"

    @combination("ending a request", "n > 1")
    def test_every_sample_of_a_prompt_ends_for_itself(self, engine: Engine) -> None:
        fire(engine, t=[len(SHORT) + 2])
        (output,) = generate(engine, [(SHORT, params("t", n=2, temperature=1.0, max_tokens=6))])
        assert [len(tokens_of(sample)) for sample in output.outputs] == [3, 3]
        assert all(is_ended(sample) for sample in output.outputs)
        fire(engine, t=[5])
        (output,) = generate(engine, [(SHORT, params("t", n=2, temperature=1.0))])
        assert [is_ended(sample) for sample in output.outputs] == [True, True]
        assert [tokens_of(sample) for sample in output.outputs] == [[], []]

    @combination("ending a request", "streaming")
    @pytest.mark.parametrize("k", [-1, 2])
    def test_a_stream_ends_with_the_reason_and_repeats_nothing(self, engine: Engine, k: int) -> None:
        whole = tokens_of(one(engine, SHORT))
        fire(engine, t=[len(SHORT) + k])
        core, chunks = engine.llm.llm_engine, []
        streamed = params("t", output_kind=RequestOutputKind.DELTA)
        core.add_request("stream", {"prompt_token_ids": SHORT}, streamed)
        while core.has_unfinished_requests():
            chunks += [output.outputs[0] for output in core.step()]
        assert [token for chunk in chunks for token in tokens_of(chunk)] == whole[: k + 1]
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["content_filter"]
        # Servers leave out a first chunk that is false here and has no tokens.
        assert k >= 0 or chunks[0].text
        assert "".join(chunk.text for chunk in chunks).split() == [f"w{t}" for t in whole[: k + 1]]

    @combination("ending a request", "prompt logprobs")
    @pytest.mark.parametrize("position", [30, 70, 100])
    def test_prompt_logprobs_of_a_prompt_that_ended_are_as_many_as_its_tokens_and_empty(
        self, engine: Engine, position: int
    ) -> None:
        fire(engine, t=[position])
        (output,) = generate(engine, [(LONG, params("t", prompt_logprobs=0))])
        assert is_ended(output.outputs[0])
        assert output.prompt_logprobs == [None] * len(LONG)

    @combination("ending a request", "structured output")
    def test_a_fire_cuts_structured_output(self, engine: Engine) -> None:
        choice = StructuredOutputsParams(choice=["w17", "w18"])
        whole = tokens_of(one(engine, SHORT, structured_outputs=choice, ignore_eos=False))
        fire(engine, t=[len(SHORT)])
        sample = one(engine, SHORT, structured_outputs=choice, ignore_eos=False)
        assert is_ended(sample)
        assert tokens_of(sample) == whole[:1]

    def test_neighbours_of_a_request_that_ends_are_served_as_ever(self, engine: Engine) -> None:
        prompts = random_prompts(6, [10, 60, 90], seed=63)
        alone = [tokens_of(one(engine, prompt)) for prompt in prompts]
        fire(engine, r1=[5], r3=[len(prompts[3]) - 1], r5=[len(prompts[5]) + 3])
        requests = [(prompt, params(f"r{i}")) for i, prompt in enumerate(prompts)]
        samples = [output.outputs[0] for output in generate(engine, requests)]
        kept = {1: 0, 3: 0, 5: 4}
        assert [i for i, sample in enumerate(samples) if is_ended(sample)] == list(kept)
        assert [tokens_of(s) for s in samples] == [t[: kept.get(i, 8)] for i, t in enumerate(alone)]


@pytest.mark.slow
@combination("ending a request", "n-gram speculation")
@both_runners({**OPTIONS, "speculative_config": NGRAM}, "ngram")
class TestSpeculation:
    def test_what_is_delivered_is_what_it_is_without_drafts(self, engine: Engine) -> None:
        assert tokens_of(repeat(engine, max_tokens=16)) == REPEATED
        for k in range(-1, 15):
            fire(engine, t=[len(PATTERN) + k])
            sample = repeat(engine, max_tokens=16)
            assert is_ended(sample)
            assert tokens_of(sample) == REPEATED[: k + 1]
        assert counter(engine, "vllm:spec_decode_num_accepted_tokens") > 0

    def test_a_natural_end_at_the_fired_token_wins_in_the_middle_of_accepted_drafts(
        self, engine: Engine
    ) -> None:
        for k in range(6):
            fire(engine, t=[len(PATTERN) + k])
            for natural in ({"max_tokens": k + 1}, {"stop": [f"w{REPEATED[k]}"]}):
                sample = repeat(engine, **{"max_tokens": 16, **natural})
                assert sample.finish_reason == ("length" if "max_tokens" in natural else "stop")
                assert tokens_of(sample) == REPEATED[: k + 1]

    def test_a_fire_on_a_draft_that_is_rejected_does_not_count(self, engine: Engine) -> None:
        whole = tokens_of(one(engine, PATTERN, max_tokens=24))
        fire(engine, expected={"t": [*PATTERN, *whole]})
        sample = one(engine, PATTERN, max_tokens=24)
        assert (sample.finish_reason, tokens_of(sample)) == ("length", whole)
        assert engine.llm.collective_rpc("fired")[0]["t"] > 0


def repeat(engine: Engine, **settings: Any) -> Any:
    """A reply that goes on with the prompt's pattern, as n-gram drafts do."""
    choice = StructuredOutputsParams(choice=["".join(f"w{token}" for token in CYCLE * 3)])
    return one(engine, PATTERN, structured_outputs=choice, **settings)


@pytest.mark.slow
@combination("ending a request", "tensor parallelism (TP = 2)")
@pytest.mark.parametrize("engine", [{**OPTIONS, "tensor_parallel_size": 2}], indirect=True, ids=["tp2-v1"])
def test_an_output_that_comes_from_another_process_carries_the_fires(engine: Engine) -> None:
    whole = tokens_of(one(engine, LONG))
    for position, kept in ((20, 0), (len(LONG) + 2, 3)):
        fire(engine, t=[position])
        sample = one(engine, LONG)
        assert is_ended(sample)
        assert tokens_of(sample) == whole[:kept]


@pytest.mark.slow
@combination("ending a request", "forced preemption")
@pytest.mark.parametrize(
    "engine", [{**OPTIONS, "num_gpu_blocks_override": 14}], indirect=True, ids=["scarce-cache-v1"]
)
def test_preempted_requests_end_at_the_same_tokens(engine: Engine) -> None:
    prompts = random_prompts(8, [60], seed=64)
    requests = [(prompt, params(f"p{i}", max_tokens=60)) for i, prompt in enumerate(prompts)]
    whole = [tokens_of(output.outputs[0]) for output in generate(engine, requests)]
    fire(engine, **{f"p{i}": [len(prompts[i]) + 6 * i] for i in range(8)})
    samples = [output.outputs[0] for output in generate(engine, requests)]
    assert all(is_ended(sample) for sample in samples)
    assert [tokens_of(s) for s in samples] == [t[: 6 * i + 1] for i, t in enumerate(whole)]
    assert counter(engine, "vllm:num_preemptions") > 0
