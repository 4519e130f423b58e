"""One vLLM engine in a process of its own, which takes turns as lines of JSON on stdin and answers on stdout.

Started by `benchmarks.child`, which chose the environment; nothing of vLLM is imported before it is set.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

__all__ = ["main"]


def main() -> None:
    """Start the engine that the first line describes, then serve one turn a line until stdin ends."""
    answers = _own_stdout()
    options = json.loads(sys.stdin.readline())
    from vllm import LLM

    llm = LLM(**options)
    _answer(answers, _describe(llm))
    for line in sys.stdin:
        _answer(answers, serve_turn(llm, json.loads(line)))


def serve_turn(llm: Any, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Serve batches one after another.

    Returns: seconds, output tokens, prompt tokens found in the prefix cache, and steered tokens × rows as
        the worker counted them.
    """
    from vllm import SamplingParams

    detokenize = not llm.llm_engine.model_config.skip_tokenizer_init
    before = _steered(llm)
    seconds, tokens, cached = 0.0, 0, 0
    for batch in batches:
        settings = {"temperature": 0.0, "max_tokens": batch["output"], "ignore_eos": True}
        steering = batch["steering"]
        tickets = [f"bench-{i}" for i in range(len(steering))] if batch["report"] else []
        extras: list[Any] = [s and {"steering": s} for s in steering]
        for extra, ticket in zip(extras, tickets, strict=False):
            extra["steering_ticket"] = ticket
        params = [SamplingParams(**settings, detokenize=detokenize, extra_args=extra) for extra in extras]
        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in batch["prompts"]]
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        if tickets:
            llm.collective_rpc("steerserve_collect", args=(tickets,))
        seconds += time.perf_counter() - started
        tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        cached += sum(output.num_cached_tokens or 0 for output in outputs)
    return {"seconds": seconds, "tokens": tokens, "cached": cached, "steered": _steered(llm) - before}


def _steered(llm: Any) -> int:
    """Tokens × rows steered since the start; 0 where the plugin is not loaded."""
    if "steerserve" not in llm.llm_engine.vllm_config.additional_config:
        return 0
    totals = llm.collective_rpc("steerserve_collect", args=([],))[0]["tokens"]
    return sum(int(count) for _, _, count in totals)


def _describe(llm: Any) -> dict[str, Any]:
    config = llm.llm_engine.vllm_config
    return {
        "compilation": config.compilation_config.mode.name,
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "dtype": str(config.model_config.dtype),
        "plugin": "steerserve" in config.additional_config,
    }


def _own_stdout() -> TextIO:
    """Keep stdout for answers: whatever vLLM and its processes print goes to stderr."""
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


def _answer(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
