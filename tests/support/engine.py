"""A real vLLM engine with the plugin, offline."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from steerserve_vllm.harvester import stop_engine

from .firing import EXTENSION
from .models import BOS, VOCAB
from .reference import Reference, Steering
from .times import starting


@dataclass
class Reply:
    """One request's tokens and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]
    cached: int


@dataclass
class Engine:
    """vLLM, and the reference for the same model and SAEs."""

    llm: LLM
    reference: Reference
    is_interpreted: bool

    def generate(
        self,
        prompts: list[list[int]],
        steering: Sequence[Steering | None],
        tickets: list[str] | None = None,
        lora: LoRARequest | None = None,
        **params: Any,
    ) -> list[Reply]:
        """Run one batch; a steering of None leaves the request alone, a list is its interventions."""
        settings = {"temperature": 0.0, "max_tokens": 8, "logprobs": 0, "ignore_eos": True, **params}
        whole = [{"interventions": s} if isinstance(s, list) else s for s in steering]
        extra: list[dict[str, Any] | None] = [None if s is None else {"steering": s} for s in whole]
        for arguments, ticket in zip(extra, tickets or [], strict=False):
            if arguments is not None:
                arguments["steering_ticket"] = ticket
        sampling = [SamplingParams(**settings, extra_args=arguments) for arguments in extra]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False, lora_request=lora)
        return [
            Reply(
                list(o.outputs[0].token_ids),
                [
                    step[t].logprob
                    for t, step in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)
                ],
                o.num_cached_tokens or 0,
            )
            for o in outputs
        ]

    def check(
        self, prompts: list[list[int]], steering: Sequence[Steering | None], replies: list[Reply]
    ) -> float:
        """Hold every logprob to the reference; returns the largest difference."""
        worst = 0.0
        for prompt, plan, reply in zip(prompts, steering, replies, strict=True):
            expected = self.reference.logprobs(prompt, reply.tokens, plan or [])
            pairs = zip(reply.logprobs, expected.tolist(), strict=True)
            difference = max(abs(a - b) for a, b in pairs)
            assert difference <= 1e-3, (plan, len(prompt), reply.logprobs, expected.tolist())
            worst = max(worst, difference)
        return worst

    def collect(self, *tickets: str) -> dict[str, Any]:
        """What the first worker says of these tickets."""
        return self.llm.collective_rpc("steerserve_collect", args=(list(tickets),))[0]

    def stop(self) -> None:
        """End the engine's processes."""
        stop_engine(self.llm)


def engine_settings(assets: dict[str, Any]) -> dict[str, Any]:
    """Engine arguments that serve every SAE and direction of `assets`; float32 and small."""
    config = {
        "saes": [
            {"name": name, "path": str(path), "resident": name in assets["resident"]}
            for name, (path, _) in assets["saes"].items()
        ],
        "directions": [{"name": n, "path": str(p)} for n, p in assets["direction_files"].items()],
    }
    return {
        "additional_config": {"steerserve": config},
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 48,
        "block_size": 32,
        "gpu_memory_utilization": 0.2,
        "seed": 0,
        "disable_log_stats": False,
        "worker_extension_cls": EXTENSION,
    }


def start_engine(model: Path, assets: dict[str, Any], **options: Any) -> Engine:
    """Start vLLM with every SAE and direction of `assets`. Args: options: change `engine_settings`."""
    with starting():
        llm = LLM(str(model), **(engine_settings(assets) | options))
    reference = Reference(model, assets["saes"], assets["directions"])
    return Engine(llm, reference, os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1")


def random_prompts(count: int, lengths: list[int], *, seed: int) -> list[list[int]]:
    """Prompts of random tokens behind BOS."""
    rng = random.Random(seed)
    return [[BOS, *(rng.randrange(3, VOCAB) for _ in range(rng.choice(lengths)))] for _ in range(count)]
