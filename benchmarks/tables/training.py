"""One training step of steerserve beside SAELens and sparsify."""

from __future__ import annotations

from typing import Any

from .markdown import machine, markdown

__all__ = ["training_table"]


def training_table(results: dict[str, Any]) -> str:
    """Markdown of the step times."""
    before, after = results["load_average"]
    preface = f"{machine(results)}; load average {before} before, {after} after."
    steps, growing = results["cases"][:2], results["cases"][2:]
    parts = [preface, *(_steps(case) for case in steps)]
    if growing:
        parts.append(_growth(growing))
    return "\n\n".join(parts)


def _steps(case: dict[str, Any]) -> str:
    heads = "trainer | step, ms | quartiles | times ours | quartiles | times ours once sparse"
    rows = []
    for name, figures in case["sides"].items():
        time, ratio = figures["milliseconds"], figures.get("ratio")
        cells = [name, f"{time['median']:.0f}", f"{time['low']:.0f}–{time['high']:.0f}"]
        cells += (
            ["", ""]
            if ratio is None
            else [f"{ratio['median']:.2f}", f"{ratio['low']:.2f}–{ratio['high']:.2f}"]
        )
        sparse = figures.get("ratio_sparse")
        rows.append([*cells, "" if sparse is None else f"{sparse['median']:.2f}"])
    size = f"d {case['d']}, F {case['features']}, B {case['batch']}, k {case['k']}"
    title = f"**{case['allocator']} allocator**, {size}, {case['rounds']} rounds in turns:"
    return f"{title}\n\n{markdown(heads, '---' + '|--:' * 5, rows)}"


def _growth(cases: list[dict[str, Any]]) -> str:
    heads = "F | topk ours, ms | SAELens | sparsify | batchtopk ours, ms | SAELens"
    rows = []
    for case in cases:
        sides = case["sides"]

        def cell(name: str, sides: dict[str, Any] = sides) -> str:
            if name not in sides:
                return ""
            ratio = sides[name].get("ratio")
            time = f"{sides[name]['milliseconds']['median']:.0f}"
            return time if ratio is None else f"{time} ({ratio['median']:.1f}×)"

        names = ("ours/topk", "saelens/topk", "sparsify/topk", "ours/batchtopk", "saelens/batchtopk")
        rows.append([f"{case['features']:,}", *(cell(name) for name in names)])
    table = markdown(heads, "--:" + "|--:" * 5, rows)
    picture = "![step time over F](results/training.svg)"
    return f"As the dictionary grows (default allocator):\n\n{table}\n\n{picture}"
