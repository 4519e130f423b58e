"""One vLLM engine in a process of its own, started by `benchmarks.child`.

The parent chose the environment; nothing of vLLM is imported before it is set.
"""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import Any

from .worker import Serve, work

__all__ = ["serve_arrivals", "serve_batches", "start"]


def start(options: dict[str, Any]) -> tuple[dict[str, Any], Serve]:
    """Start the engine; a turn then holds either `batches` or `arrivals`."""
    from vllm import LLM

    llm = LLM(**options)
    return _describe(llm), partial(_serve, llm)


def _serve(llm: Any, turn: dict[str, Any]) -> dict[str, Any]:
    before = _steered(llm)
    if "batches" in turn:
        result = serve_batches(llm, turn["batches"])
    else:
        result = serve_arrivals(llm, turn["arrivals"])
    return {**result, "steered": _steered(llm) - before}


def serve_batches(llm: Any, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Serve batches one after another.

    Returns: seconds, output tokens, and prompt tokens found in the prefix cache.
    """
    seconds, tokens, cached = 0.0, 0, 0
    for batch in batches:
        steering = batch["steering"]
        tickets = [f"bench-{i}" for i in range(len(steering))] if batch["report"] else []
        params = [_params(llm, batch["output"], one) for one in steering]
        for one, ticket in zip(params, tickets, strict=False):
            one.extra_args["steering_ticket"] = ticket
        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in batch["prompts"]]
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        if tickets:
            llm.collective_rpc("steerserve_collect", args=(tickets,))
        seconds += time.perf_counter() - started
        tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        cached += sum(output.num_cached_tokens or 0 for output in outputs)
    return {"seconds": seconds, "tokens": tokens, "cached": cached}


def serve_arrivals(llm: Any, arrivals: list[dict[str, Any]]) -> dict[str, Any]:
    """Serve requests that come at their times, in their order.

    Returns: what each request was answered and when, in seconds since the start, and the seconds in which
        there was nothing to do.
    """
    engine = llm.llm_engine
    params = [_params(llm, arrival["output"], arrival["steering"]) for arrival in arrivals]
    coming = deque(range(len(arrivals)))
    replies: list[list[int]] = [[] for _ in arrivals]
    finished = [0.0] * len(arrivals)
    idle = 0.0
    started = time.perf_counter()
    while coming or engine.has_unfinished_requests():
        now = time.perf_counter() - started
        while coming and arrivals[coming[0]]["at"] <= now:
            i = coming.popleft()
            engine.add_request(str(i), {"prompt_token_ids": arrivals[i]["prompt"]}, params[i])
        if not engine.has_unfinished_requests():
            idle += (pause := max(arrivals[coming[0]]["at"] - now, 0.0))
            time.sleep(pause)
            continue
        for output in engine.step():
            if output.finished:
                replies[int(output.request_id)] = list(output.outputs[0].token_ids)
                finished[int(output.request_id)] = time.perf_counter() - started
    return {"replies": replies, "finished": finished, "idle": idle}


def _params(llm: Any, output: int, steering: dict[str, Any] | None) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=output,
        ignore_eos=True,
        detokenize=not llm.llm_engine.model_config.skip_tokenizer_init,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=None if steering is None else {"steering": steering},
    )


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


if __name__ == "__main__":
    work(start)
