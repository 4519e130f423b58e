"""steerserve beside transformers with a full-encode hook."""

from __future__ import annotations

from typing import Any

from .markdown import machine, markdown, settings, spread

__all__ = ["hf_table"]

_SIDES = {
    "steerserve": "vLLM with steerserve",
    "hf_hook": "transformers, full-encode hook",
    "hf_plain": "transformers, nobody steers",
}


def hf_table(results: dict[str, Any]) -> str:
    """Markdown of the results beside transformers."""
    return "\n\n".join([_hf_preface(results), _sides_table(results["sides"]), _agreement(results)])


def _hf_preface(results: dict[str, Any]) -> str:
    shape, traffic, processes = results["shape"], results["traffic"], results["processes"]
    before, after = results["load_average"]
    (least, most), (shortest, longest) = traffic["prompt"], traffic["output"]
    return (
        f"{machine(results)}; {settings(results)}; {results['rounds']} rounds.\n\n"
        f"**{shape['name']}** (d {shape['d_model']}, {shape['sae']} SAE of {shape['d_sae']} features), "
        f"{processes['hf']['dtype'].removeprefix('torch.')}: {traffic['requests']} requests of {least} to "
        f"{most} + {shortest} to {longest} tokens, {traffic['plans']} plans of {traffic['rows']} rows, "
        f"{traffic['rate']:g} requests a second on average; transformers with {processes['hf']['threads']} "
        f"threads and batches of up to {processes['hf']['batch']}; "
        f"load average {before} before, {after} after."
    )


def _sides_table(sides: dict[str, Any]) -> str:
    rows = []
    for name, figures in sides.items():
        speed, ratio = figures["tokens_per_second"], figures["ratio"]
        times = ("seconds", "median_latency", "p95_latency", "idle_seconds")
        medians = [f"{figures[time]['median']:.1f}" for time in times]
        rows.append([_SIDES.get(name, name), *spread(speed, 1), *spread(ratio, 2), *medians])
    heads = (
        "side | tokens/s | quartiles | ratio to the hook | quartiles | whole turn, s | median latency, s "
        "| p95 latency, s | idle, s"
    )
    return markdown(heads, "---" + "|--:" * 8, rows)


def _agreement(results: dict[str, Any]) -> str:
    during, checked = results["agreement"]["bfloat16"], results["agreement"]["float32"]
    asked = f"float32, {checked['requests']} requests"
    variety = f"{checked['tokens']} tokens, {checked['different_tokens']} different ones"
    rows = [
        [f"{asked}, steered: {variety}", *_shares(checked["steered"])],
        [f"{asked}, unsteered", *_shares(checked["unsteered"])],
        [f"{asked}, steered and unsteered ones of transformers", *_shares(checked["steered_and_unsteered"])],
    ]
    rows += [[f"bfloat16, round {n}, steered", *_shares(one)] for n, one in enumerate(during, start=1)]
    heads = "answers of vLLM and transformers | the same | tokens before the first difference"
    return markdown(heads, "---|--:|--:", rows)


def _shares(agreement: dict[str, float]) -> list[str]:
    return [f"{agreement[name]:.1%}" for name in ("answers", "tokens")]
