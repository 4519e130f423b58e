"""The dense products of a training step, by torch's own BLAS and as the trainer makes them."""

from __future__ import annotations

from typing import Any

from .markdown import machine, markdown

__all__ = ["products_table"]


def products_table(results: dict[str, Any]) -> str:
    """Markdown of the products' times."""
    before, after = results["load_average"]
    first = results["cases"][0]
    size = f"d {first['d']}, B {first['batch']}, {results['threads']} threads"
    preface = (
        f"{machine(results)}; load average {before} before, {after} after; "
        f"{size}, {results['rounds']} rounds in turns."
    )
    rows = []
    for case in results["cases"]:
        for name, found in case["products"].items():
            blas, own, ratio = found["blas_ms"], found["ours_ms"], found["ratio"]
            cells = [f"{case['features']:,}", name, f"{blas['median']:.1f}", f"{own['median']:.1f}"]
            cells += [f"{ratio['median']:.2f}", f"{ratio['low']:.2f}–{ratio['high']:.2f}"]
            rows.append([*cells, f"{found['ours_gflops']:.0f}"])
    heads = "F | product | BLAS, ms | ours, ms | times as fast | quartiles | ours, GFLOP/s"
    return f"{preface}\n\n{markdown(heads, '--:|---' + '|--:' * 5, rows)}"
