"""`steerserve harvest`: run text through the served model and keep the residual stream at one hook point."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from steerserve.catalog import Catalog
from steerserve.config import HarvestConfig
from steerserve.hookpoint import HookPoint
from steerserve.training.capture import Capture
from steerserve.training.corpus import read_texts
from steerserve.training.shards import ShardWriter

__all__ = ["harvest", "open_capture"]


def open_capture(model_config: Any, config: HarvestConfig, point: HookPoint, catalog: Catalog) -> Capture:
    """The capture of this worker, writing where the configuration says."""
    writer = ShardWriter(
        config.out,
        catalog.d_model,
        hook=point.name,
        model=str(model_config.model),
        dtype="float32" if str(model_config.dtype) == "torch.float32" else "bfloat16",
    )
    return Capture(writer, point, catalog.special_tokens)


def harvest(
    model: str,
    prompts: Iterable[list[int] | str],
    config: HarvestConfig,
    *,
    total: int | None = None,
    batch: int = 512,
    **engine: Any,
) -> int:
    """Capture the stream of every prompt token through vLLM and this plugin, in the order of the prompts.

    Args:
        model: what `vllm.LLM` takes.
        prompts: texts, or token ids as the model should see them (BOS included); prompt i becomes sequence i.
        config: the hook point and the folder of the shards.
        total: how many prompts there are, for the progress bar.
        batch: prompts handed to vLLM at once.
        engine: further arguments of `vllm.LLM`.
    Returns: how many activations were written.
    Raises: ConfigError if the folder holds shards already, or the model has no such layer.
    """
    from vllm import LLM, SamplingParams

    os.environ.setdefault("VLLM_PLUGINS", "steerserve")
    settings = {"steerserve": {"harvest": config.model_dump(mode="json")}}
    llm = LLM(model, additional_config=settings, enable_prefix_caching=False, **engine)
    params = SamplingParams(max_tokens=1, detokenize=False, ignore_eos=True)
    columns = (TextColumn("harvest"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("harvest", total=total)
        waiting: list[Any] = []
        for prompt in prompts:
            waiting.append({"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt)
            if len(waiting) == batch:
                llm.generate(waiting, params, use_tqdm=False)
                progress.advance(task, len(waiting))
                waiting = []
        if waiting:
            llm.generate(waiting, params, use_tqdm=False)
            progress.advance(task, len(waiting))
    written = llm.collective_rpc("steerserve_close_capture")
    core = llm.llm_engine.engine_core
    core.shutdown()
    core.ctx.destroy(linger=0)
    return sum(written)


def main() -> None:
    """The engine side of `steerserve harvest`: vLLM's engine arguments are accepted as they are."""
    import argparse

    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(description="Harvest activations through vLLM.")
    parser.add_argument("model_path")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--hook", choices=["resid_post", "resid_pre"], default="resid_post")
    EngineArgs.add_cli_args(parser)
    defaults = {action.dest: action.default for action in parser._actions}
    given: argparse.Namespace = parser.parse_args()
    own = ("model_path", "corpus", "out", "layer", "hook", "model")
    engine = {k: v for k, v in vars(given).items() if k not in own and v != defaults.get(k)}
    config = HarvestConfig(layer=given.layer, hook=given.hook, out=given.out.absolute())
    texts = read_texts(given.corpus)
    written = harvest(given.model_path, texts, config, total=len(texts), **engine)
    print(f"{given.out}: {written:,} activations of {len(texts):,} texts")


if __name__ == "__main__":
    main()
