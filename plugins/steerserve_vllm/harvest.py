"""Harvesting from Python: an engine for one harvest, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

from steerserve.config import HarvestConfig
from steerserve.training.corpus import Corpus
from steerserve.training.part import WHOLE, Part

from .harvest_progress import Report, progress_bar
from .harvester import Harvester

__all__ = ["harvest"]


def harvest(
    model: str,
    prompts: Corpus | Iterable[list[int] | str],
    config: HarvestConfig,
    *,
    total: int | None = None,
    batch: int = 512,
    rows_per_shard: int = 65_536,
    resume: bool = False,
    part: Part = WHOLE,
    report: Callable[[Report], None] | None = None,
    **engine: Any,
) -> int:
    """Capture the stream of every ordinary prompt token through vLLM and this plugin, in the prompts' order.

    Args:
        model: what `vllm.LLM` takes.
        prompts: a corpus, texts, or token ids as the model should see them (BOS included); prompt i becomes
            sequence i, unless one is too long and becomes several.
        config: the hook points and the folder of the shards.
        total: how many prompts there are, for the progress bar; a corpus knows.
        batch, rows_per_shard, resume, part: see `Harvester.run`.
        report: told what is done, in place of the bar.
        engine: further arguments of `vllm.LLM`.
    Returns: how many activations were written.
    Raises: see `Harvester` and `Harvester.run`.
    """
    whole = prompts.size if isinstance(prompts, Corpus) else total
    shown = nullcontext(report) if report is not None else progress_bar(whole)
    with Harvester(model, config, **engine) as harvester, shown as show:
        return harvester.run(
            prompts,
            config.out,
            batch=batch,
            rows_per_shard=rows_per_shard,
            resume=resume,
            part=part,
            report=show,
        )
