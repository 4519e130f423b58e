"""The report as one HTML page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from . import plots
from .definitions import DEFINITIONS
from .elements import bold, figure, number, percent, table
from .overview import means, overview

__all__ = ["to_html"]

Report = dict[str, Any]

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""


def to_html(report: Report) -> str:
    """Args: report: what `to_json` returns."""
    saes = report["saes"]
    name = f"{len(saes)} SAEs" if len(saes) > 1 else saes[0]["name"]
    terms = (f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in DEFINITIONS.items())
    body = [
        f'<p class="soft">{escape(_summary(report))}</p>',
        f'<h2>Overview</h2>\n<div class="card scroll">{overview(saes)}</div>',
        f'<div class="card scroll below">{means(saes)}</div>' if saes[0]["labelled"] else "",
        _curves(saes),
        *(_concepts(sae) for sae in saes if sae["labelled"]),
        *(_steering(sae) for sae in saes if sae["steering"]),
        f'<h2>Definitions</h2>\n<div class="card"><dl>{"".join(terms)}</dl></div>',
    ]
    return _PAGE.format(
        title=escape(f"{name} of {'/'.join(report['model'].rstrip('/').split('/')[-2:])}"),
        style=files(__package__).joinpath("page.css").read_text(encoding="utf-8"),
        body="\n".join(body),
    )


def _summary(report: Report) -> str:
    material = report["material"]
    counts = {
        "texts": material["texts"],
        "concepts": len(material["labels"]),
        "harvested tokens": material["shard_rows"],
        "prompts": material["prompts"],
    }
    named = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    return f"Language model {report['model']}. Judged on {named}. steerserve {report['steerserve']}."


def _curves(saes: Sequence[Report]) -> str:
    tokens = saes[0]["reconstruction"]["tokens"]
    density = figure(
        plots.density(saes), f"How often features fire, on {tokens:,} tokens. Dead ones left out."
    )
    frontier = figure(plots.frontier(saes), "Sparsity against fidelity: up and to the left is better.")
    found = f'<h2>Features and fidelity</h2>\n<div class="grid">{density}{frontier}</div>'
    if log := plots.training(saes):
        found += f"\n<h2>Training</h2>\n{figure(log, 'From the training log beside each SAE.')}"
    return found


def _concepts(sae: Report) -> str:
    found = sae["labelled"]
    rows, ms = found["concepts"], found["monosemanticity"]
    below = sum(row["latent"]["f1"] < row["probe"]["f1"] for row in rows)
    told = (
        f'<span class="loses">loses to the linear probe on {below} of {len(rows)} concepts</span>'
        if below
        else f'<span class="wins">is at least as good as the linear probe on all {len(rows)} concepts</span>'
    )
    sizes = [
        [size, *(number(one[key], 3) for key in ("score", "intended", "unintended"))]
        for size, one in found["tpp"].items()
    ]
    tpp = table(["latents ablated", "TPP", "own probe", "other probes"], sizes)
    return (
        f"<h2>Concepts: {escape(sae['name'])}</h2>\n"
        f"<p>The best single latent {told}, by F1 on held-out tokens. Monosemanticity is "
        f"{number(ms['mean'], 3)} on average over {ms['features']:,} features; chance is "
        f"{number(ms['chance'], 3)}.</p>\n"
        f'<div class="grid">{figure(plots.concepts(sae), "Single latents against linear probes.")}'
        f'<div class="card"><h3>Targeted probe perturbation</h3>{tpp}'
        '<p class="note">Fall of balanced accuracy when a concept\'s latents are ablated.</p></div></div>\n'
        f'<div class="card scroll below">{_concept_table(rows)}</div>'
    )


def _concept_table(rows: Sequence[Report]) -> str:
    head = ["concept", "feature", "latent F1", "probe F1", "latent AUROC", "probe AUROC", "F1 by text"]
    head += ["latents", "main", "absorption", "full"]
    cells = [
        [
            escape(row["label"]),
            str(row["feature"]),
            bold(row["latent"]["f1"], 2),
            number(row["probe"]["f1"], 2),
            number(row["latent"]["auroc"], 2),
            number(row["probe"]["auroc"], 2),
            f"{row['latent_text']['f1']:.2f} / {row['probe_text']['f1']:.2f}",
            str(row["latents"]),
            str(len(row["main"])),
            percent(row["absorption"]["fraction"]),
            percent(row["absorption"]["full"]),
        ]
        for row in rows
    ]
    return table(head, cells)


def _steering(sae: Report) -> str:
    found = sae["steering"]
    score, leads = found["methods"]["sae"]["overall"], found["sae_leads"]
    rivals = sorted((name for name in leads if name != "unsteered"), key=lambda name: leads[name]["mean"])
    ahead = [_behind(name, leads[name]) for name in rivals if leads[name]["mean"] < 0]
    told = '<span class="wins">No control is ahead of it.</span>'
    if ahead:
        told = f'It <span class="loses">loses to</span> {", ".join(ahead)}.'
    labels = list(dict.fromkeys(row["label"] for row in found["outcomes"]))
    means = f"Means over {len(labels)} concepts and {found['prompts']} prompts that chose nothing."
    price = "What strength buys and what it costs, on the prompts that chose it."
    return (
        f"<h2>Steering: {escape(sae['name'])}</h2>\n"
        '<div class="card verdict">Steering by one feature scores '
        f"<b>{score:.2f}</b> of 2 overall. {told} "
        "The axes are computed, not judged by a language model: see the definitions.</div>\n"
        f'<div class="grid below">{figure(plots.steering(sae), means)}'
        f"{figure(plots.strengths(sae), price)}</div>\n"
        f'<h3>Overall score by concept</h3>\n<div class="card scroll">{_matrix(found, labels)}</div>\n'
        "<details><summary>A sample of each</summary>\n"
        f'<div class="card scroll">{_samples(found)}</div></details>'
    )


def _behind(name: str, lead: Report) -> str:
    """A control that is ahead, by how much, and whether that is more than chance among the concepts."""
    if lead["interval"] is None:
        return f"{escape(name)} by {-lead['mean']:.2f}"
    noise = ", within the noise" if lead["interval"] > -lead["mean"] else ""
    return f"{escape(name)} by {-lead['mean']:.2f} ± {lead['interval']:.2f}{noise}"


def _matrix(found: Report, labels: Sequence[str]) -> str:
    methods = list(found["methods"])
    overall = {(row["label"], row["method"]): row["axes"]["overall"] for row in found["outcomes"]}
    rows = []
    for label in labels:
        own = [overall[label, method] for method in methods]
        cells = [bold(value, 2) if value == max(own) else number(value, 2) for value in own]
        rows.append([escape(label), *cells])
    return table(["concept", *methods], rows)


def _samples(found: Report) -> str:
    rows = [
        [
            escape(row["label"]),
            escape(row["method"]),
            "" if row["feature"] is None else str(row["feature"]),
            "" if row["strength"] is None else f"{row['strength']:g}",
            number(row["axes"]["overall"], 2),
            f'<td class="text">{escape(row["sample"][0])} <b>{escape(row["sample"][1])}</b></td>',
        ]
        for row in found["outcomes"]
    ]
    return table(["concept", "method", "feature", "strength", "overall", "text"], rows)
