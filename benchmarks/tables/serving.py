"""What steering costs while serving."""

from __future__ import annotations

from typing import Any

from .markdown import machine, markdown, settings, spread

__all__ = ["serving_table"]

_VARIANTS = {
    "stock": "stock vLLM",
    "control": "stock vLLM, a second engine",
    "idle": "plugin, nobody steers",
    "one": "all steered, one plan",
    "many64": "all steered, 64 plans",
    "reports64": "all steered, 64 plans, reports",
    "layers16": "all steered, 64 plans, 16 layers",
}


def serving_table(results: dict[str, Any]) -> str:
    """Markdown of a serving benchmark's results."""
    preface = f"{machine(results)}; {settings(results)}; {results['rounds']} rounds."
    return "\n\n".join([preface, *map(_model_table, results["models"])])


def _model_table(model: dict[str, Any]) -> str:
    load = model["load"]
    before, after = model["load_average"]
    preface = (
        f"**{model['name']}** (d {model['d_model']}, {model['sae']} SAEs of {model['d_sae']} features): "
        f"{load['batches']} × {load['requests']} requests of {load['prompt']} + {load['output']} tokens "
        f"a turn, {load['rows']} rows a plan; load average {before} before, {after} after."
    )
    rows = []
    for name, figures in model["variants"].items():
        speed, ratio = figures["tokens_per_second"], figures["ratio"]
        target = "" if figures["target"] is None else f"{figures['target']:.2f}"
        met = {None: "", True: "yes", False: "no"}[figures["met"]]
        cells = [_VARIANTS.get(name, name), *spread(speed, 1), *spread(ratio, 3), target, met]
        rows.append(cells)
    heads = "variant | tokens/s | quartiles | ratio to stock | quartiles | target | met"
    return preface + "\n\n" + markdown(heads, "---|--:|--:|--:|--:|--:|:-:", rows)
