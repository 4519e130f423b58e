"""What requests may combine with steering, and what they may read from each other's cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from tests.support.combinations import both_runners, combination
from tests.support.engine import Engine, random_prompts
from tests.support.misplaced import SPELLINGS

pytestmark = both_runners()

CLAMP: dict[str, Any] = {"sae": "jump", "feature": 3, "op": "clamp", "value": 9.0}
OTHER: dict[str, Any] = {"sae": "std", "feature": 4, "op": "add", "value": 5.0}
BLOCK = 32


TURN: Any = [{"role": "user", "content": "w5 w6"}]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
ASKED = {"interventions": [CLAMP]}


def _extra(llm: Any, name: str) -> None:
    _generate(llm, SamplingParams(max_tokens=1, extra_args={**_unless_read(name)}))


def _nested(llm: Any, name: str) -> None:
    _generate(llm, SamplingParams(max_tokens=1, extra_args={"extra_body": {name: ASKED}}))


def _text(llm: Any, name: str) -> None:
    _generate(llm, SamplingParams(max_tokens=1, extra_args={"extra_body": json.dumps({name: ASKED})}))


def _bare(llm: Any, name: str) -> None:
    _generate(llm, SamplingParams(max_tokens=1, extra_args={"edits": [CLAMP]}))


def _attribute(llm: Any, name: str) -> None:
    params = SamplingParams(max_tokens=1)
    setattr(params, name, ASKED)
    _generate(llm, params)


def _prompt(llm: Any, name: str) -> None:
    llm.generate([{"prompt_token_ids": [0, 5], name: ASKED}], SamplingParams(max_tokens=1), use_tqdm=False)


def _raw_prompt(llm: Any, name: str) -> None:
    prompt = {"prompt_token_ids": [0, 5], name: ASKED}
    llm.llm_engine.add_request("raw", prompt, SamplingParams(max_tokens=1))


def _processor(llm: Any, name: str) -> None:
    llm.generate(["w5"], SamplingParams(max_tokens=1), use_tqdm=False, mm_processor_kwargs={name: ASKED})


def _tokenizer(llm: Any, name: str) -> None:
    llm.generate(["w5"], SamplingParams(max_tokens=1), use_tqdm=False, tokenization_kwargs={name: ASKED})


def _template(llm: Any, name: str) -> None:
    _chat(llm, TURN, chat_template_kwargs={name: ASKED})


def _message(llm: Any, name: str) -> None:
    _chat(llm, [{**TURN[0], name: ASKED}])


def _beams(llm: Any, name: str) -> None:
    llm.beam_search([{"prompt_token_ids": [0, 5], name: ASKED}], BeamSearchParams(beam_width=2, max_tokens=2))


def _beam_attribute(llm: Any, name: str) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=2)
    setattr(params, name, ASKED)
    llm.beam_search([{"prompt_token_ids": [0, 5]}], params)


# Offline ways to ask for steering that vLLM takes and nothing reads.
OFFLINE: dict[str, Callable[[Any, str], None]] = {
    "extra_args": _extra,
    "an object in extra_args": _nested,
    "text in extra_args": _text,
    "interventions without a name": _bare,
    "an attribute of the parameters": _attribute,
    "a prompt": _prompt,
    "a prompt for the engine itself": _raw_prompt,
    "settings of the processor": _processor,
    "settings of the tokenizer": _tokenizer,
    "settings of the template": _template,
    "a message": _message,
    "a prompt of beam search": _beams,
    "an attribute of beam search's parameters": _beam_attribute,
}


def _unless_read(name: str) -> dict[str, Any]:
    """By a name that is read, what is not."""
    return {"interventions": [CLAMP]} if name in ("steering", "steering_ticket") else {name: ASKED}


def _generate(llm: Any, params: SamplingParams) -> None:
    llm.generate([{"prompt_token_ids": [0, 5]}], [params], use_tqdm=False)


def _chat(llm: Any, turns: Any, **more: Any) -> None:
    llm.chat(turns, SamplingParams(max_tokens=1), chat_template=TEMPLATE, use_tqdm=False, **more)


def _within(intervention: dict[str, Any], **where: Any) -> list[dict[str, Any]]:
    return [{**intervention, "where": where}]


@combination("prefix caching")
class TestPrefixCache:
    """Prompts of 101 tokens fill three blocks of 32, which a later request may find in the cache."""

    @pytest.mark.parametrize(
        ("first", "second", "shared_blocks"),
        [
            ([CLAMP], None, 0),
            (None, [CLAMP], 0),
            ([CLAMP], [OTHER], 0),
            ([CLAMP], [{**CLAMP, "value": 8.0}], 0),
            ([CLAMP], [CLAMP], 3),
            (_within(CLAMP, phase="generation"), None, 3),
            (None, _within(CLAMP, phase="generation"), 3),
            (_within(CLAMP, phase="prompt"), _within(CLAMP, phase="generation"), 0),
            (None, _within(CLAMP, start=40), 1),
            (_within(CLAMP, start=40), _within(CLAMP, start=70), 1),
            # The same rows at the same positions are the same key material only under the same plan.
            (_within(CLAMP, stop=20), _within(CLAMP, stop=20), 3),
        ],
    )
    def test_a_block_is_shared_exactly_where_the_same_rows_touched_it(
        self, engine: Engine, first: Any, second: Any, shared_blocks: int
    ) -> None:
        prompt = random_prompts(1, [100], seed=11)
        engine.llm.reset_prefix_cache()
        engine.check(prompt, [first], engine.generate(prompt, [first]))
        reply = engine.generate(prompt, [second])
        engine.check(prompt, [second], reply)
        assert reply[0].cached == shared_blocks * BLOCK

    @pytest.mark.parametrize("follow_up", [_within(CLAMP, phase="generation"), None])
    def test_a_reply_steered_in_generation_is_not_read_as_a_prompt(
        self, engine: Engine, follow_up: Any
    ) -> None:
        prompt = random_prompts(1, [40], seed=12)
        engine.llm.reset_prefix_cache()
        first = engine.generate(prompt, [_within(CLAMP, phase="generation")], max_tokens=70)
        longer = [prompt[0] + first[0].tokens]
        reply = engine.generate(longer, [follow_up])
        engine.check(longer, [follow_up], reply)
        assert reply[0].cached == BLOCK  # what lies before the first generated token

    def test_the_report_counts_tokens_from_the_cache_apart(self, engine: Engine) -> None:
        prompt = random_prompts(1, [100], seed=13)
        engine.llm.reset_prefix_cache()
        engine.generate(prompt, [[CLAMP]], ["cold"])
        engine.generate(prompt, [[CLAMP]], ["warm"])
        tallies = engine.collect("cold", "warm")["tallies"]
        # Of each ticket its one request, of that its one row.
        ((cold_cached, _, cold, *_),), ((warm_cached, _, warm, *_),) = tallies["cold"][0], tallies["warm"][0]
        assert (cold, cold_cached) == (100 + 7, 0)
        assert (warm, warm_cached) == (100 + 7 - 95, 95)  # three blocks, less BOS


class TestCombinations:
    @combination("n > 1", "logprobs")
    def test_several_samples_of_one_prompt_are_all_steered(self, engine: Engine) -> None:
        params = SamplingParams(
            n=3, seed=1, temperature=1.0, max_tokens=6, logprobs=0, ignore_eos=True,
            extra_args={"steering": json.dumps({"interventions": [CLAMP]}), "steering_ticket": "n3"},
        )  # fmt: skip
        # All three prompts fit into one step: stock vLLM on CPU dies of a seeded request whose prompt is cut.
        prompt = random_prompts(1, [12], seed=21)[0]
        (output,) = engine.llm.generate([{"prompt_token_ids": prompt}], [params], use_tqdm=False)
        for sample in output.outputs:
            tokens = list(sample.token_ids)
            expected = engine.reference.logprobs(prompt, tokens, [CLAMP]).tolist()
            got = [step[t].logprob for t, step in zip(tokens, sample.logprobs, strict=True)]
            assert got == pytest.approx(expected, abs=1e-3)
        assert engine.collect("n3")["requests"]["n3"] == 3

    @combination("prompt logprobs", "chunked prefill")
    def test_prompt_logprobs_are_those_of_the_steered_model(self, engine: Engine) -> None:
        prompt = random_prompts(1, [60], seed=22)[0]
        params = SamplingParams(
            temperature=0,
            max_tokens=1,
            prompt_logprobs=0,
            extra_args={"steering": {"interventions": [CLAMP]}},
        )
        (output,) = engine.llm.generate([{"prompt_token_ids": prompt}], [params], use_tqdm=False)
        table = engine.reference.all_logprobs(prompt, len(prompt), [CLAMP])
        for position, step in enumerate(output.prompt_logprobs[1:], start=1):
            token = prompt[position]
            assert step[token].logprob == pytest.approx(float(table[position - 1, token]), abs=1e-3)

    @combination("penalties", "structured output")
    def test_penalties_and_structured_output_work_beside_steering(self, engine: Engine) -> None:
        prompts = random_prompts(2, [20], seed=23)
        steering = {"steering": {"interventions": [CLAMP]}}
        choice = StructuredOutputsParams(choice=["w17", "w18"])
        params = [
            SamplingParams(max_tokens=6, presence_penalty=1.5, frequency_penalty=1.0, extra_args=steering),
            SamplingParams(max_tokens=6, structured_outputs=choice, extra_args=steering),
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        penalised, chosen = engine.llm.generate(inputs, params, use_tqdm=False)
        assert len(set(penalised.outputs[0].token_ids)) > 1
        assert chosen.outputs[0].text.strip() in ("w17", "w18")

    @combination("abort")
    def test_an_aborted_request_gives_its_slot_back_and_leaves_its_neighbour_alone(
        self, engine: Engine
    ) -> None:
        prompts = random_prompts(2, [40], seed=25)
        core = engine.llm.llm_engine
        for name, prompt in zip(("leaves", "stays"), prompts, strict=True):
            params = SamplingParams(
                temperature=0,
                max_tokens=8,
                logprobs=0,
                ignore_eos=True,
                extra_args={"steering": {"interventions": [CLAMP]}, "steering_ticket": name},
            )
            core.add_request(name, {"prompt_token_ids": prompt}, params)
        for _ in range(3):
            core.step()
        core.abort_request(["leaves"])
        done = []
        while core.has_unfinished_requests():
            done += [output for output in core.step() if output.finished]
        (output,) = done
        tokens = list(output.outputs[0].token_ids)
        got = [step[t].logprob for t, step in zip(tokens, output.outputs[0].logprobs, strict=True)]
        expected = engine.reference.logprobs(prompts[1], tokens, [CLAMP]).tolist()
        assert got == pytest.approx(expected, abs=1e-3)
        engine.generate(prompts[:1], [None])  # workers hear of an abort with their next step
        assert engine.collect()["slots"]["in_use"] == 0

    def test_equal_plans_share_a_slot_and_all_slots_come_back(self, engine: Engine) -> None:
        prompts = random_prompts(12, [10, 30], seed=24)
        engine.generate(prompts, [[{**CLAMP, "value": float(i % 3)}] for i in range(12)])
        engine.generate(prompts[:1], [None])
        slots = engine.collect()["slots"]
        assert slots == {"in_use": 0, "capacity": 16}


class TestRefusals:
    @pytest.mark.parametrize(
        ("steering", "place"),
        [
            ({"interventions": [{**CLAMP, "feature": 70_000}]}, "$.steering.interventions[0].feature"),
            ({"interventions": [{**CLAMP, "sae": "nope"}]}, "$.steering.interventions[0].sae"),
            ({"interventions": [{**CLAMP, "value": float("nan")}]}, "$.steering.interventions[0].value"),
            ({"interventions": [{**CLAMP, "value": True}]}, "$.steering.interventions[0].value"),
            ({"interventions": [CLAMP, CLAMP]}, "$.steering.interventions[1]"),
            ({"interventions": [CLAMP], "error": "drop"}, "$.steering.error"),
            ({"interventions": [CLAMP], "eror": "keep"}, "$.steering.eror"),
            ("{not json", "$.steering"),
            (17, "$.steering"),
        ],
    )
    def test_a_bad_request_is_refused_by_name_and_the_engine_lives(
        self, engine: Engine, steering: Any, place: str
    ) -> None:
        prompt = random_prompts(1, [10], seed=31)
        params = SamplingParams(max_tokens=1, extra_args={"steering": steering})
        with pytest.raises(VLLMValidationError) as refused:
            engine.llm.generate([{"prompt_token_ids": prompt[0]}], [params], use_tqdm=False)
        assert refused.value.parameter == place
        assert len(engine.generate(prompt, [[CLAMP]])[0].tokens) == 8

    @pytest.mark.parametrize("asks", OFFLINE)
    def test_steering_where_nothing_reads_it_is_refused_offline_too(self, engine: Engine, asks: str) -> None:
        for name in SPELLINGS:
            with pytest.raises(VLLMValidationError, match=r"nothing reads|only the server sets"):
                OFFLINE[asks](engine.llm, name)

    def test_nothing_of_that_is_run_and_what_has_other_names_passes(self, engine: Engine) -> None:
        assert not engine.llm.llm_engine.has_unfinished_requests()
        params = SamplingParams(max_tokens=1, extra_args={"session": "steering"})
        tools = [{"type": "function", "function": {"name": "steering", "parameters": {"steering": {}}}}]
        for output in (
            engine.llm.generate([{"prompt": "w5"}], params, use_tqdm=False),
            engine.llm.chat(TURN, params, tools=tools, chat_template=TEMPLATE, use_tqdm=False),
        ):
            assert len(output[0].outputs[0].token_ids) == 1
        beams = engine.llm.beam_search([{"prompt": "w5"}], BeamSearchParams(beam_width=2, max_tokens=2))
        assert len(beams[0].sequences) == 2

    def test_a_client_cannot_hand_in_a_plan_of_its_own(self, engine: Engine) -> None:
        params = SamplingParams(max_tokens=1, extra_args={"steerserve": {"plan": ["x", []], "ticket": ""}})
        with pytest.raises(VLLMValidationError, match="only the server sets"):
            engine.llm.generate([{"prompt_token_ids": [0, 5]}], [params], use_tqdm=False)
