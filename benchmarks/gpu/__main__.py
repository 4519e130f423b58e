"""Measure what steering costs on an NVIDIA GPU.

First the kernel is held to the reference; if it is wrong anywhere, nothing is timed. Then a launch by
itself is timed against what its bytes take at the speed of a large copy; the token map and the count; a
decode loop in the shape of Llama 3.1 8B with the op behind some of its layers, against the same loop
without it; and, where vLLM for CUDA is installed, `python -m benchmarks.serving` is run. Writes
results.json and plot.png.

Needs torch with CUDA, triton, what steerserve itself needs, matplotlib for the plot, and 60 GB of GPU memory
for a batch of 256.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns: exit status; 0 measured, 1 the kernel is wrong, 2 this machine cannot measure."""
    options = _parser().parse_args(arguments)
    if refusal := _refusal():
        print(f"benchmarks.gpu: {refusal}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    results = _measure(options)
    _write(options.out, results)
    return 0 if results["ok"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the results are written"
    )
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 16, 64, 256],
        help="requests of the decode loop (%(default)s)",
    )
    parser.add_argument(
        "--hooked",
        type=int,
        nargs="+",
        default=[1, 16],
        choices=[1, 2, 4, 8, 16, 32],
        help="how many of the loop's 32 layers have the op behind them (%(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of each variant (%(default)s)")
    return parser


def _refusal() -> str:
    """Why nothing can be measured here; empty where it can."""
    try:
        import rich  # noqa: F401
        import torch
        import triton  # noqa: F401

        import steerserve.steer  # noqa: F401
    except ImportError as missing:
        return f"expected steerserve with all it needs, torch with CUDA and triton; {missing}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"expected an NVIDIA GPU, but torch {torch.__version__} finds none: run it where there is one"
    return ""


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import triton

    from ..command import progress_bar
    from ..machine import machine
    from .serving import serve

    results: dict[str, Any] = {
        "command": shlex.join([sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "machine": machine(),
    }
    with progress_bar() as progress, torch.inference_mode():
        results["check"] = _check(progress)
        results["ok"] = all(one["ok"] for one in results["check"])
        if not results["ok"]:
            return results
        results |= _time_launches(progress)
        torch.cuda.empty_cache()
        results["loop"] = _time_loop(options, progress)
    torch.cuda.empty_cache()
    results["serving"] = serve(options.out)
    return results


def _check(progress: Progress) -> list[dict[str, Any]]:
    from .kernel import CHECKS, check

    task = progress.add_task("check", total=len(CHECKS), detail="")
    found: list[dict[str, Any]] = []
    for case in CHECKS:
        progress.update(task, detail=f"width {case[0]}, {case[1]} rows")
        found += check(*case)
        progress.advance(task)
    return found


def _time_launches(progress: Progress) -> dict[str, Any]:
    from .kernel import cost
    from .step import bookkeeping
    from .timing import copy_bandwidth

    task = progress.add_task("launches", total=3, detail="a large copy")
    bandwidth = copy_bandwidth()
    progress.update(task, advance=1, detail="the op")
    kernel = list(cost(bandwidth))
    progress.update(task, advance=1, detail="token map and count")
    step = list(bookkeeping())
    progress.update(task, advance=1, detail="done")
    return {"bytes_per_second": bandwidth, "kernel": kernel, "step": step}


def _time_loop(options: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    import torch

    from .loop import VARIANTS, measure
    from .model import LLAMA_8B, Decoder

    turns = len(options.batches) * (options.rounds + 1) * (1 + len(options.hooked) * len(VARIANTS))
    task = progress.add_task("decode loop", total=turns, detail="writing weights")
    decoder = Decoder(LLAMA_8B, "cuda", torch.bfloat16)

    def advance(detail: str) -> None:
        progress.update(task, advance=1, detail=detail)

    found = []
    for batch in options.batches:
        found.append(measure(decoder, batch, options.hooked, options.rounds, advance))
        torch.cuda.empty_cache()
    return found


def _write(folder: Path, results: dict[str, Any]) -> None:
    """results.json, and plot.png if there is something to plot and something to plot it with."""
    if results["ok"]:
        from .plot import plot

        try:
            plot(results["loop"], f"{results['gpu']}: a Llama-8B-shaped decode step", folder / "plot.png")
            results["plot"] = "plot.png"
        except ImportError:
            results["plot"] = "matplotlib: not present"
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    wrong = [one for one in results["check"] if not one["ok"]]
    for one in wrong:
        print(f"benchmarks.gpu: the kernel is wrong: {one}", file=sys.stderr)
    print(folder / "results.json")


if __name__ == "__main__":
    sys.exit(main())
