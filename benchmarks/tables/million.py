"""What the size of an SAE costs."""

from __future__ import annotations

from typing import Any

from .markdown import machine, markdown

__all__ = ["million_table"]


def million_table(results: dict[str, Any]) -> str:
    """Markdown of what an SAE's size costs: a line for each size."""
    before, after = results["load_average"]
    preface = (
        f"{machine(results)}; d {results['width']}; medians, least and most; "
        f"load average {before} before, {after} after."
    )
    rows = []
    for size in results["sizes"]:
        times = [size["open_sae_ms"], size["build_catalog_ms"], size["process_s"]]
        times += [size["first_use_ms"][state]["wall"] for state in ("cold", "hole", "warm")]
        growth = [f"{kinds['rss']:.1f}" for kinds in size["growth_mib"].values()]
        rows.append([f"{size['d_sae']:,}", f"{size['file_gib']:.2f}", *map(_extremes, times), *growth])
    heads = (
        "features | file, GiB | `open_sae`, ms | `build_catalog`, ms | whole process, s "
        "| first use of a feature: cold, ms | never written, ms | warm, ms "
        "| memory once opened, MiB | with 64 features named, MiB"
    )
    return preface + "\n\n" + markdown(heads, "--:" + "|--:" * 9, rows)


def _extremes(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})"
