"""The tables of `benchmarks/README.md`, written between its markers from the JSON that was measured.

python -m benchmarks.table results.json [step.json]
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["main", "serving_table", "step_table"]

README = Path(__file__).with_name("README.md")
_MEANING = {
    "stock": "stock vLLM",
    "control": "stock vLLM, a second engine",
    "idle": "plugin, nobody steers",
    "one_plan": "all steered, one plan",
    "plans_32": "all steered, 32 plans",
    "reported": "all steered, 32 plans, reports",
}


def main(
    files: Annotated[
        list[Path], typer.Argument(help="JSON of `benchmarks.serving` and of `benchmarks.step`.")
    ],
    readme: Annotated[Path, typer.Option(help="The file whose tables are replaced.")] = README,
) -> None:
    """Replace what stands between the markers of the README by tables of these results."""
    text = readme.read_text(encoding="utf-8")
    for file in files:
        results = json.loads(file.read_text(encoding="utf-8"))
        if "models" in results:
            text = _replace(text, "serving", serving_table(results))
        else:
            text = _replace(text, "step", step_table(results))
    readme.write_text(text, encoding="utf-8")


def serving_table(results: dict[str, Any]) -> str:
    """Markdown of a serving benchmark's results."""
    return "\n\n".join([_preface(results), *(_model_table(model, results) for model in results["models"])])


def step_table(results: dict[str, Any]) -> str:
    """Markdown of the step benchmark's results: microseconds a step."""
    lines = [
        f"{_machine(results)}; medians of {results['repeats']} steps, microseconds.",
        "",
        "| phase | requests | tokens | rows | d | begin | steer | settle | whole step |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case in results["cases"]:
        spent = case["microseconds"]
        shape = [case["phase"], case["requests"], case["tokens"], case["rows"], case["d_model"]]
        times = [f"{spent[part]:.0f}" for part in ("begin", "steer", "settle", "step")]
        lines.append("| " + " | ".join([*map(str, shape), *times]) + " |")
    return "\n".join(lines)


def _preface(results: dict[str, Any]) -> str:
    settings = ", ".join(f"`{name}={value}`" for name, value in results["environment"].items())
    return f"{_machine(results)}; {settings}; {results['rounds']} rounds."


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return f"{machine['cpu']}, {machine['cores']} cores; Python {machine['python']}, {packages}"


def _model_table(model: dict[str, Any], results: dict[str, Any]) -> str:
    load = model["load"]
    before, after = model["load_average"]
    lines = [
        f"**{model['name']}** (d {model['d_model']}, {model['sae']} SAE of {model['d_sae']} features): "
        f"{load['batches']} × {load['requests']} requests of {load['prompt']} + {load['output']} tokens "
        f"a turn, {load['rows']} rows a plan; load average {before} before, {after} after.",
        "",
        "| variant | tokens/s | quartiles | ratio to stock | quartiles | target | met |",
        "|---|--:|--:|--:|--:|--:|:-:|",
    ]
    for name, figures in model["variants"].items():
        speed, ratio = figures["tokens_per_second"], figures["ratio"]
        target = "" if figures["target"] is None else f"{figures['target']:.2f}"
        met = {None: "", True: "yes", False: "no"}[figures["met"]]
        cells = [
            _MEANING.get(name, name),
            f"{speed['median']:.1f}",
            f"{speed['low']:.1f} to {speed['high']:.1f}",
            f"{ratio['median']:.3f}",
            f"{ratio['low']:.3f} to {ratio['high']:.3f}",
            target,
            met,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _replace(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    replaced, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL
    )
    if count != 1:
        raise typer.BadParameter(f"expected one pair of markers {begin} … {end}, found {count}")
    return replaced


if __name__ == "__main__":
    typer.run(main)
