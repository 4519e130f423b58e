"""What steering costs on a GPU: one launch, a decode loop, and a step's bookkeeping."""

from __future__ import annotations

from typing import Any

from .markdown import machine, markdown, spread

__all__ = ["gpu_table"]


def gpu_table(results: dict[str, Any]) -> str:
    """Markdown of the GPU benchmark's results, the decode loop first."""
    if not results["ok"]:
        return "The kernel differed from its reference, so nothing was timed."
    bandwidth = results["bytes_per_second"] / 1e9
    preface = (
        f"{results['gpu']}; {machine(results)}, triton {results['triton']}; the kernel held to its reference "
        f"in {len(results['check'])} cases first; a large copy moves {bandwidth:,.0f} GB/s."
    )
    parts = [preface, _loop(results["loop"]), _launches(results["kernel"]), _bookkeeping(results["step"])]
    return "\n\n".join(parts)


def _loop(loop: list[dict[str, Any]]) -> str:
    rows = []
    for batch in loop:
        for one in batch["variants"]:
            named = [str(batch["batch"]), one["variant"], str(one["hooked_layers"])]
            rows.append([*named, *spread(one["milliseconds"], 3), *spread(one["ratio"], 3)])
    heads = "batch | variant | hooked layers | a decode step, ms | quartiles | times unhooked | quartiles"
    return markdown(heads, "--:|---" + "|--:" * 5, rows)


def _launches(kernel: list[dict[str, Any]]) -> str:
    rows = []
    for one in kernel:
        times = "" if one["times_floor"] is None else f"{one['times_floor']:.2f}"
        spent = [f"{one['microseconds']:.2f}", f"{one['floor_microseconds']:.2f}", times]
        rows.append([str(one["batch"]), one["kind"], *spent])
    heads = "batch | kind | a launch, µs | its bytes at a copy's speed, µs | times that"
    return markdown(heads, "--:|---|--:|--:|--:", rows)


def _bookkeeping(step: list[dict[str, Any]]) -> str:
    rows = [
        [
            one["phase"],
            *(str(one[name]) for name in ("requests", "tokens")),
            *(f"{one[name]:.2f}" for name in ("map_microseconds", "count_microseconds")),
        ]
        for one in step
    ]
    return markdown("phase | requests | tokens | token map, µs | count, µs", "---" + "|--:" * 4, rows)
