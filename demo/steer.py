"""The demo model under steering, offline: many prompts at once, and whose words their continuations use."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import track

from demo.corpus.labeller import label

__all__ = [
    "MAX_INTERVENTIONS",
    "TEMPERATURE",
    "TOKENS",
    "Ask",
    "Steered",
    "asks",
    "prepare_environment",
    "share",
]

TEMPERATURE = 0.8
# The largest ablation of the cards fits.
MAX_INTERVENTIONS = 64
TOKENS = 24
BATCH = 512


@dataclass(frozen=True)
class Ask:
    """One request: a prompt, and the interventions of its `steering` object (none leaves it alone)."""

    prompt: str
    interventions: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0


def asks(
    prompts: Sequence[str], interventions: list[dict[str, Any]] | None = None, *, samples: int = 1
) -> list[Ask]:
    """Every prompt `samples` times, each with a seed of its own."""
    return [
        Ask(prompt, interventions or [], sample * len(prompts) + number)
        for sample in range(samples)
        for number, prompt in enumerate(prompts)
    ]


def share(texts: Iterable[str], domain: str) -> float:
    """The share of texts that the grammar's labeller gives to the domain."""
    labels = [label(text) for text in texts]
    return labels.count(domain) / len(labels)


def prepare_environment() -> None:
    """Settings that vLLM reads from the environment, where they are not made already."""
    os.environ.setdefault("VLLM_PLUGINS", "steerserve")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Steered:
    """vLLM with the demo model and its SAE, closed at the end of a `with`.

    Needs to be made under a main guard: vLLM starts a process of its own.
    """

    def __init__(self, model: Path, sae: Path) -> None:
        self._llm = self._start(model, sae)

    def __enter__(self) -> Steered:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def texts(self, wanted: Sequence[Ask], tokens: int = TOKENS) -> list[str]:
        """The continuation of every request, in their order; the same for the same seeds."""
        from vllm import SamplingParams

        texts: list[str] = []
        for start in track(range(0, len(wanted), BATCH), "continuations", disable=len(wanted) <= BATCH):
            part = wanted[start : start + BATCH]
            params = [
                SamplingParams(
                    temperature=TEMPERATURE,
                    max_tokens=tokens,
                    seed=ask.seed,
                    extra_args={"steering": {"interventions": ask.interventions, "report": False}}
                    if ask.interventions
                    else None,
                )
                for ask in part
            ]
            outputs = self._llm.generate([ask.prompt for ask in part], params, use_tqdm=False)
            texts += [output.outputs[0].text for output in outputs]
        return texts

    def shares(self, wanted: Mapping[Any, tuple[str, list[Ask]]], tokens: int = TOKENS) -> dict[Any, float]:
        """For each named (domain, requests): the domain's share, all of them together."""
        flat = [ask for _, group in wanted.values() for ask in group]
        texts = iter(self.texts(flat, tokens))
        return {name: share([next(texts) for _ in group], domain) for name, (domain, group) in wanted.items()}

    def surprise(self, wanted: Sequence[Ask], texts: Sequence[str]) -> float:
        """Nats per token of `texts`, as continuations of their prompts, under the unsteered model."""
        from vllm import SamplingParams

        tokenizer = self._llm.get_tokenizer()
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        whole = [ask.prompt + text for ask, text in zip(wanted, texts, strict=True)]
        total, count = 0.0, 0
        for ask, output in zip(wanted, self._llm.generate(whole, params, use_tqdm=False), strict=True):
            first = len(tokenizer(ask.prompt).input_ids)
            steps = zip(output.prompt_token_ids[first:], output.prompt_logprobs[first:], strict=True)
            logprobs = [step[token].logprob for token, step in steps]
            total, count = total - sum(logprobs), count + len(logprobs)
        return total / max(count, 1)

    @staticmethod
    def _start(model: Path, sae: Path) -> Any:
        prepare_environment()
        from vllm import LLM

        return LLM(
            str(model),
            additional_config={
                "steerserve": {
                    "saes": [{"name": "demo", "path": str(sae.absolute())}],
                    "max_interventions": MAX_INTERVENTIONS,
                }
            },
            max_model_len=512,
            max_num_seqs=64,
            enforce_eager=True,
            gpu_memory_utilization=0.2,
            seed=0,
            disable_log_stats=True,
        )
