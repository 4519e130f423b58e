"""Data-parallel replicas, served by vLLM's asynchronous engine in a process of their own.

`python -m tests.support.replicas` reads {"model", "settings", "prompts", "steering"} as JSON from stdin, runs
all prompts at once, and prints the tokens and log-probabilities of each and what the workers counted.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

TICKET = "all"


def main() -> None:
    """Serve what stdin asks for; the answer is the last line of stdout."""
    asked = json.load(sys.stdin)
    print(json.dumps(asyncio.run(_serve(asked))))


async def _serve(asked: dict[str, Any]) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from steerserve_vllm.endpoint import ask_workers
    from tests.support.forking import fork_engines

    fork_engines(here=True)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(asked["model"], **asked["settings"]))
    try:
        pairs = zip(asked["prompts"], asked["steering"], strict=True)
        replies = await asyncio.gather(*(_one(engine, i, *pair) for i, pair in enumerate(pairs)))
        return {"replies": replies, "counted": list(await ask_workers(engine)([TICKET]))}
    finally:
        engine.shutdown()


async def _one(engine: Any, number: int, prompt: list[int], steering: Any) -> dict[str, Any]:
    from vllm import SamplingParams

    extra = None if steering is None else {"steering": steering, "steering_ticket": TICKET}
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=0, ignore_eos=True, extra_args=extra)
    last: Any = None
    async for output in engine.generate({"prompt_token_ids": prompt}, params, f"request-{number}"):
        last = output.outputs[0]
    tokens = list(last.token_ids)
    steps = zip(tokens, last.logprobs, strict=True)
    return {"tokens": tokens, "logprobs": [step[token].logprob for token, step in steps]}


if __name__ == "__main__":
    main()
