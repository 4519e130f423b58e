"""The tables at the top of the report's page: one row for each SAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from .elements import bold, number, percent, table

__all__ = ["means", "overview"]

Report = dict[str, Any]


def overview(saes: Sequence[Report]) -> str:
    """Fidelity and sparsity of each SAE, and what the model loses by it."""
    columns: list[tuple[str, Callable[[Report], str]]] = [
        ("SAE", lambda sae: escape(sae["name"])),
        ("architecture", lambda sae: escape(sae["architecture"])),
        ("features", lambda sae: f"{sae['d_sae']:,}"),
        ("hook", lambda sae: escape(sae["hook"] or "not named")),
        ("explained variance", lambda sae: bold(sae["reconstruction"]["explained_variance"], 3)),
        ("R²", lambda sae: number(sae["reconstruction"]["r2"], 3)),
        ("L0", lambda sae: number(sae["reconstruction"]["l0"], 1)),
        ("dead", lambda sae: percent(sae["reconstruction"]["dead_fraction"])),
        ("dense", lambda sae: percent(sae["reconstruction"]["dense_fraction"])),
    ]
    if saes[0]["model_loss"]:
        columns += [
            ("CE score", lambda sae: bold(sae["model_loss"]["ce_score"], 3)),
            ("KL score", lambda sae: number(sae["model_loss"]["kl_score"], 3)),
            ("CE clean", lambda sae: number(sae["model_loss"]["ce_clean"], 3)),
            ("CE with SAE", lambda sae: number(sae["model_loss"]["ce_sae"], 3)),
        ]
    if saes[0]["known_features"]:
        columns += [
            ("MMCS", lambda sae: number(sae["known_features"]["mmcs"], 3)),
            ("MCC", lambda sae: number(sae["known_features"]["mcc"], 3)),
            ("uniqueness", lambda sae: number(sae["known_features"]["uniqueness"], 3)),
        ]
    return table([name for name, _ in columns], [[cell(sae) for _, cell in columns] for sae in saes])


def means(saes: Sequence[Report]) -> str:
    """Means over concepts, one row for each SAE."""
    head = ["SAE", "latent F1", "probe F1", "latents per concept", "absorption", "TPP, 10 latents"]
    head += ["monosemanticity", "steering", "best control"]
    rows = []
    for sae in saes:
        found, concepts = sae["labelled"], sae["labelled"]["concepts"]
        rows.append([
            escape(sae["name"]),
            bold(_mean(concepts, "latent", "f1"), 3),
            number(_mean(concepts, "probe", "f1"), 3),
            number(sum(row["latents"] for row in concepts) / len(concepts), 1),
            percent(_mean(concepts, "absorption", "fraction")),
            number(found["tpp"]["10"]["score"] if "10" in found["tpp"] else None, 3),
            number(found["monosemanticity"]["mean"], 3),
            *_best(sae["steering"]),
        ])  # fmt: skip
    return table(head, rows)


def _mean(concepts: Sequence[Report], group: str, key: str) -> float:
    return float(sum(row[group][key] for row in concepts) / len(concepts))


def _best(steering: Report | None) -> tuple[str, str]:
    """The SAE's overall score, and the control that does best."""
    if steering is None:
        return number(None, 2), number(None, 2)
    scores = {name: one["overall"] for name, one in steering["methods"].items()}
    rivals = [name for name in scores if name not in ("sae", "unsteered")]
    best = max(rivals, key=lambda name: scores[name])
    return bold(scores["sae"], 2), f"{escape(best)} {scores[best]:.2f}"
