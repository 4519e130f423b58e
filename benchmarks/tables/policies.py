"""What policies cost."""

from __future__ import annotations

from typing import Any

from .markdown import machine, markdown, spread

__all__ = ["admission_table", "policies_table"]


def admission_table(results: dict[str, Any]) -> str:
    """Markdown of the time that admitting a request takes."""
    found = results["admission_microseconds"]
    rows = [
        [name, *(f"{found[key][which]:.0f}" for which in ("p50", "p99", "max"))]
        for name, key in ((f"{found['interventions']} interventions", "new"), ("none", "unsteered"))
    ]
    preface = (
        f"{machine(results)}; {found['policies']} policies, {found['samples']:,} requests, no two alike."
    )
    heads = "a request of | p50, µs | p99, µs | most, µs"
    return f"{preface}\n\n{markdown(heads, '---' + '|--:' * 3, rows)}"


def policies_table(results: dict[str, Any]) -> str:
    """Markdown of the speed under policies, and of what they do to text that they are not about."""
    before, after = results["load_average"]
    serving, effects = results["throughput"], results["side_effects"]
    rows = []
    for asked, name in (("unsteered", "nothing"), ("steered", f"{serving['load']['rows']} interventions")):
        found = serving[asked]
        rows.append([name, *spread(found["ratio_to_no_policies"], 3), *spread(found["tokens_per_second"], 0)])
    heads = "requests ask for | with ÷ without policies | quartiles | tokens/s | quartiles"
    worst, least = _worst(effects["domains"])
    return "\n\n".join(
        [
            f"{machine(results)}; load average {before} before, {after} after; {serving['rounds']} rounds.",
            markdown(heads, "---" + "|--:" * 4, rows),
            f"The demo's insult features {effects['features']} held: cross-entropy of all other domains' "
            f"text {effects['others_change']:+.3%}, of the worst of them ({worst}) {least:+.2%}, of insults "
            f"{effects['domains']['insult']['change']:+.1%}.",
        ]
    )


def _worst(domains: dict[str, Any]) -> tuple[str, float]:
    changes = {name: found["change"] for name, found in domains.items() if name != "insult"}
    name = max(changes, key=lambda one: float(changes[one]))
    return name, changes[name]
