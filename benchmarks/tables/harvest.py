"""What harvesting takes."""

from __future__ import annotations

from typing import Any

from .markdown import machine, markdown, settings, spread

__all__ = ["harvest_table"]


def harvest_table(results: dict[str, Any]) -> str:
    """Markdown of the memory of each process, and of the speed with and without an end at the layer."""
    before, after = results["load_average"]
    model, memory = results["model"], results["memory"]
    preface = (
        f"{machine(results)}; {settings(results)}; layer {model['harvested_layer']} of {model['layers']}, "
        f"d {model['d_model']}, {results['engine']['dtype']}; load average {before} before, {after} after."
    )
    written = (
        f"{memory['bytes'] / 2**30:.2f} GiB of shards ({memory['tokens']:,} activations, "
        f"{memory['tokens_per_second']:,.0f} tokens/s):"
    )
    processes = []
    for name, start in memory["kib_before"].items():
        most = memory["kib_peak"][name]["VmHWM"]
        processes.append([name, *(f"{kib / 1024:,.0f}" for kib in (start, most, most - start))])
    sides = []
    for name, figures in results["speed"].items():
        speed, ratio = spread(figures["tokens_per_second"], 0), spread(figures["ratio"], 3)
        sides.append([name, *speed, *ratio])
    return "\n\n".join(
        [
            preface,
            written,
            markdown("process | before, MiB | at most, MiB | growth, MiB", "---|--:|--:|--:", processes),
            f"{results['rounds']} rounds of {results['tokens_of_a_turn']:,} tokens:",
            markdown("the pass | tokens/s | quartiles | ratio | quartiles", "---|--:|--:|--:|--:", sides),
        ]
    )
