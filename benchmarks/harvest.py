"""What harvesting takes: memory for a gigabyte of activations, and what ending the pass at the layer saves.

python -m benchmarks.harvest && python -m benchmarks.table
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .child import Child
from .command import ERROR, RESULTS, leave_on_sigterm, progress_bar, publish
from .machine import load_average, machine
from .rounds import order
from .settings import Setup, core_environment
from .summary import Turn, speeds

__all__ = ["main"]

LENGTH = 512
_ENGINE: dict[str, Any] = {
    "max_model_len": 2048,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "gpu_memory_utilization": 0.2,
    "disable_log_stats": True,
    "seed": 0,
}


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("sae_weights/demo/model"),
    layer: Annotated[int, typer.Option(min=0, help="The layer that is harvested.")] = 3,
    gib: Annotated[float, typer.Option(min=0.001, help="Activations of the memory measurement.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each engine.")] = 7,
    tokens: Annotated[int, typer.Option(min=LENGTH, help="Tokens of a turn.")] = 65_536,
    dtype: Annotated[str, typer.Option(help="Of the model and the activations.")] = "bfloat16",
    eager: Annotated[bool, typer.Option(help="Without torch.compile.")] = False,
    kv_mib: Annotated[int, typer.Option(min=16, help="Size of the KV cache, which a harvest fills.")] = 128,
    reserved_cores: Annotated[int, typer.Option(min=0, help="Cores that vLLM leaves alone.")] = 0,
    folder: Annotated[Path | None, typer.Option(help="Write the shards below this folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the JSON here.")] = RESULTS / "harvest.json",
) -> None:
    """Harvest one layer, and the last, in turns; then a gigabyte of the one, watching the memory."""
    leave_on_sigterm()
    shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
    last = shape["num_hidden_layers"] - 1
    environment = core_environment(reserved_cores)
    # In whole GiB, and it would outdo the engine's own argument.
    del environment["VLLM_CPU_KVCACHE_SPACE"]
    before = load_average()
    with ExitStack() as stack:
        work = stack.enter_context(tempfile.TemporaryDirectory(prefix="steerserve-bench-", dir=folder))
        engine = {**_ENGINE, "enforce_eager": eager, "dtype": dtype, "kv_cache_memory_bytes": kv_mib * 2**20}
        children = {}
        for name, place in (("ends at the layer", layer), ("runs to the last layer", last)):
            options = {
                "model": str(model.absolute()),
                "layer": place,
                "vocab": shape["vocab_size"],
                "length": LENGTH,
                "engine": engine,
            }
            setup = Setup("benchmarks.harvesting", options, {**environment, "VLLM_PLUGINS": "steerserve"})
            children[name] = stack.enter_context(Child(setup, Path(work) / f"{place}.log"))
            ERROR.print(f"starting an engine that harvests layer {place}")
            children[name].wait_until_ready()
        width = getattr(torch, dtype).itemsize * shape["hidden_size"]
        wanted = int(gib * 2**30 / width) // LENGTH * LENGTH
        ERROR.print(f"harvesting {wanted:,} activations, watching the memory")
        memory = children["ends at the layer"].turn({"seed": -1, "tokens": wanted, "folder": work})
        turns = _turns(children, rounds, tokens, work)
    results = {
        "machine": machine(),
        "load_average": [before, load_average()],
        "environment": environment,
        "engine": engine,
        "model": {"layers": last + 1, "d_model": shape["hidden_size"], "harvested_layer": layer},
        "memory": {**memory, "tokens_per_second": memory["tokens"] / memory["seconds"]},
        "rounds": rounds,
        "tokens_of_a_turn": tokens // LENGTH * LENGTH,
        "speed": speeds(turns, "runs to the last layer"),
    }
    publish(results, out)


def _turns(children: dict[str, Child], rounds: int, tokens: int, work: str) -> list[Turn]:
    """A round to warm up, which is not kept, and `rounds` that are."""
    turns = []
    with progress_bar() as progress:
        task = progress.add_task("turns", total=(rounds + 1) * len(children), detail="")
        for number in range(-1, rounds):
            for name in order(list(children), max(number, 0)):
                progress.update(task, detail=name)
                done = children[name].turn({"seed": number, "tokens": tokens, "folder": work})
                progress.advance(task)
                if number >= 0:
                    turns.append(Turn(number, name, done["seconds"], done["tokens"], 0))
    return turns


if __name__ == "__main__":
    typer.run(main)
