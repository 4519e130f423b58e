"""A vLLM engine that harvests: sequences in, batch by batch, the residual stream to shards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from steerserve.config import HarvestConfig, HarvestPoints
from steerserve.errors import ConfigError, SteerserveError
from steerserve.training.corpus import Corpus
from steerserve.training.part import WHOLE, Part, check_parts
from steerserve.training.sequences import Batch, batches, token_lists
from steerserve.training.shard_file import INDEX

from .driver import driving
from .harvest_progress import Report
from .setup import catalog_for

if TYPE_CHECKING:
    from vllm import LLM

__all__ = ["Harvester", "stop_engine"]

# What a worker keeps of the batch that is being run, at all hook points together.
_BUFFER_BYTES = 256 * 2**20


def stop_engine(llm: LLM) -> None:
    """End an engine's processes, and close the sockets to them, which vLLM leaves to the collector."""
    core = llm.llm_engine.engine_core
    core.shutdown()
    # It waits on a socket until it is told to end: one that is closed under it aborts the whole process.
    core.output_queue_thread.join()
    core.ctx.destroy(linger=0)


class Harvester:
    """An engine that runs the model up to the deepest of some hook points, and keeps the stream there.

    Args:
        model: what `vllm.LLM` takes.
        points: where.
        engine: further arguments of `vllm.LLM`.
    Raises: ConfigError if an argument does not go with harvesting, or the model has no such layer.
    """

    def __init__(self, model: str, points: HarvestPoints, **engine: Any) -> None:
        from vllm import LLM, SamplingParams

        os.environ.setdefault("VLLM_PLUGINS", "steerserve")
        self.points = points
        with driving():
            self._llm = LLM(model, **_arguments(points, engine))
        # What is sampled is thrown away; vLLM has no request that samples nothing.
        self._params = SamplingParams(max_tokens=1, temperature=0, detokenize=False, ignore_eos=True)
        self._requests = 0
        config = self._llm.llm_engine.vllm_config
        catalog = catalog_for(config)
        assert catalog is not None
        self._special = catalog.special_tokens
        self._longest = config.model_config.max_model_len - 1
        bytes_per_token = catalog.d_model * config.model_config.dtype.itemsize * len(points.layers)
        self._capacity = _BUFFER_BYTES // bytes_per_token

    def run(
        self,
        prompts: Corpus | Iterable[list[int] | str],
        out: Path,
        *,
        batch: int = 512,
        rows_per_shard: int = 65_536,
        resume: bool = False,
        part: Part = WHOLE,
        report: Callable[[Report], None] = lambda _: None,
    ) -> int:
        """Harvest every prompt: to `out`, or to a folder below it for each of several layers.

        Args:
            prompts: a corpus, texts, or token ids as the model should see them (BOS included). What is longer
                than the engine's `max_model_len` − 1 is cut (see `sequences.pieces`).
            batch: the most sequences handed to vLLM at once.
            rows_per_shard: activations per file, which is what a kill may lose.
            resume: go on behind the whole shards of a harvest that was cut short; without it, a folder that
                holds shards is refused. The rows are those that it would have written, in the same order.
            part: which of the prompts are harvested, to a folder below that of the layer (see `join_parts`).
            report: told what is done after every batch.
        Returns: how many activations were written, of all layers.
        Raises: ConfigError if the folder holds a whole harvest or the prompts are not what they should be;
            SteerserveError if it holds another one, the disk is full or an activation is not finite. Whole
            shards stay.
        """
        config = HarvestConfig(layer=self.points.layer, hook=self.points.hook, out=out.absolute())
        for folder in config.folders.values():
            check_parts(folder, part.of)
        folders = {layer: part.folder(folder) for layer, folder in config.folders.items()}
        if resume and all((folder / INDEX).exists() for folder in folders.values()):
            raise ConfigError(f"expected an unfinished harvest or a new folder, {out} holds a whole harvest")
        named = [(layer, str(folder)) for layer, folder in folders.items()]
        own = (part.number, part.of)
        self._ask("open", named, self._capacity, rows_per_shard, resume, own)
        try:
            self._run_all(part.take(prompts), batch, report)
            return sum(self._ask("close"))
        except BaseException:
            with suppress(Exception):  # an engine that died has nothing to abandon
                self._llm.collective_rpc("steerserve_harvest_abandon")
            raise

    def close(self) -> None:
        """End the engine's processes."""
        stop_engine(self._llm)

    def __enter__(self) -> Harvester:
        return self

    def __exit__(self, _: type[BaseException] | None, __: object, ___: TracebackType | None) -> None:
        self.close()

    def _run_all(
        self, prompts: Corpus | Iterable[list[int] | str], batch: int, report: Callable[[Report], None]
    ) -> None:
        todo = self._batches(prompts, batch)
        began, ran = time.monotonic(), 0
        current = next(todo, None)
        while current is not None:
            needed = self._begin(current)
            try:
                # While the engine is at it, the next texts are read and tokenised.
                following = next(todo, None)
            finally:
                if needed:
                    self._llm.wait_for_completion(use_tqdm=False)
                    self._ask("end_batch")
            if needed:
                ran += current.tokens
            else:
                began = time.monotonic()
            report(Report(current.read, current.tokens, ran / max(1e-9, time.monotonic() - began), needed))
            current = following

    def _batches(self, prompts: Corpus | Iterable[list[int] | str], most: int) -> Iterator[Batch]:
        return batches(
            token_lists(prompts, self._encode),
            longest=self._longest,
            special=self._special,
            max_tokens=self._capacity,
            max_sequences=most,
        )

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self._llm.get_tokenizer().encode(text)
        return tokens

    def _begin(self, batch: Batch) -> bool:
        """Set the engine to work on a batch; returns False where that needs no work."""
        flat = np.fromiter(chain.from_iterable(batch.sequences), dtype=np.int32, count=batch.tokens)
        lengths = [len(sequence) for sequence in batch.sequences]
        if not any(self._ask("begin_batch", self._requests, batch.first, lengths, flat.tobytes())):
            return False
        # All requests are there before the first step: steps are then the same in every run, to the last bit.
        self._llm.sleep(level=0, mode="keep")
        prompts = [{"prompt_token_ids": sequence} for sequence in batch.sequences]
        names = self._llm.enqueue(prompts, self._params, use_tqdm=False)
        if names[0].split("-", 1)[0] != str(self._requests):
            raise SteerserveError(f"expected vLLM to number requests from {self._requests}, got {names[0]!r}")
        self._requests += len(names)
        self._llm.wake_up(tags=["scheduling"])
        return True

    def _ask(self, method: str, *args: Any) -> list[Any]:
        """What the workers that harvest answer.

        Raises: SteerserveError with the message of one that cannot.
        """
        answers = self._llm.collective_rpc(f"steerserve_harvest_{method}", args=args)
        for _, message in answers:
            if message is not None:
                raise SteerserveError(message)
        return [value for value, _ in answers if value is not None]


def _arguments(points: HarvestPoints, engine: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm.LLM`: those given, and what a harvest needs."""
    from vllm.platforms import current_platform

    if int(engine.get("data_parallel_size") or 1) > 1:
        raise ConfigError(
            "expected one engine, got `data_parallel_size` > 1: `steerserve harvest --data-parallel-size N` "
            "starts one for each replica, and joins what they wrote"
        )
    if engine.get("enable_prefix_caching"):
        raise ConfigError("expected no prefix caching: what is found in the cache is not computed, nor kept")
    additional = dict(engine.get("additional_config") or {})
    if "steerserve" in additional:
        raise ConfigError("expected no `steerserve` in the additional config of a harvest")
    additional["steerserve"] = {"harvest": points.model_dump(mode="json", include={"layer", "hook"})}
    return {
        # Of what a CUDA graph replays, nothing could be kept.
        **({} if current_platform.is_cpu() else {"compilation_config": {"cudagraph_mode": "NONE"}}),
        **engine,
        "enable_prefix_caching": False,
        "additional_config": additional,
    }
