"""What a policy costs text that it is not about: cross-entropy by domain, with and without it, one engine."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from .worker import Serve, work

__all__ = ["policy_document", "start"]

_SEED = 7_000_003


def policy_document(features: list[int], mode: str) -> str:
    """A policy that ablates these features of the SAE `demo`, on special tokens too."""
    where = {"special_tokens": True}
    interventions = [{"sae": "demo", "feature": one, "op": "ablate", "where": where} for one in features]
    # JSON is YAML.
    return json.dumps(
        {
            "name": "measured",
            "version": 1,
            "mode": mode,
            "owner": "benchmark",
            "reason": "measured",
            "interventions": interventions,
        }
    )


def start(options: dict[str, Any]) -> tuple[dict[str, Any], Serve]:
    """Start the engine; a turn names the policy folder, the features and how many documents are read."""
    from vllm import LLM

    return {}, partial(_serve, LLM(**options))


def _serve(llm: Any, turn: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for mode in ("off", "enforce"):
        Path(turn["policies"], "measured.yaml").write_text(
            policy_document(turn["features"], mode), encoding="utf-8"
        )
        # A folder is looked at every half a second.
        time.sleep(1.0)
        found[mode] = _cross_entropy(llm, turn["documents"])
    return {
        domain: {"tokens": count, "without": before, "with": found["enforce"][domain][1]}
        for domain, (count, before) in found["off"].items()
    }


def _cross_entropy(llm: Any, documents: int) -> dict[str, tuple[int, float]]:
    """Domain → tokens, and nats per token of the domain in held-out documents."""
    from vllm import SamplingParams

    from demo.corpus.documents import labelled_documents, tokenise

    tokenizer = llm.get_tokenizer()
    read = [tokenise(document, tokenizer) for document in labelled_documents(_SEED, documents)]
    prompts = [{"prompt_token_ids": ids[:480]} for ids, _ in read]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for (ids, domains), output in zip(read, llm.generate(prompts, params, use_tqdm=False), strict=True):
        for token, domain, step in zip(ids[1:480], domains[1:480], output.prompt_logprobs[1:], strict=False):
            sums[domain] -= step[token].logprob
            counts[domain] += 1
    return {domain: (counts[domain], sums[domain] / counts[domain]) for domain in sorted(counts)}


if __name__ == "__main__":
    work(start)
