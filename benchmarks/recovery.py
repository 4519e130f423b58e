"""Known features found again: our trainer beside SAELens', same data, steps, batch and seeds; JSON.

python -m benchmarks.recovery
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer

from steerserve.judging.dictionary import judge_dictionary
from steerserve.theory.recovery import RECOVERED, RecoverySetup, planted_data, recover, settings_for
from steerserve.training.evaluate import evaluate
from steerserve.training.generated import train_on

from . import synthetic
from .command import RESULTS, progress_bar, publish
from .machine import load_average, machine
from .saelens_training import train_saelens

__all__ = ["main"]

_SYNTHETIC = ("batchtopk", "matryoshka")
_SYNTHETIC_K = 6
_HELD_OUT, _HELD_OUT_SEED = 8192, 1_000_003
_SCORES = ("mmcs", "mcc", "explained_variance", "l0", "dead_fraction")


@dataclass(frozen=True)
class Side:
    """One trainer with its settings; where one has several, its best by MCC counts."""

    name: str
    settings: Mapping[str, Any]


def sides(architecture: str, setup: RecoverySetup) -> list[Side]:
    """Ours with one setting, SAELens' with several: its documented ones, and ours in its own units.

    SAELens scales inputs to a mean norm of √d, where we scale to 1: a penalty of ours is √d (L1) or d (L0)
    times as large in its units, a bandwidth or a threshold √d.
    """
    settings = settings_for(architecture, setup)
    chosen = {"lr": settings.peak_lr, "dead_after": settings.patience, **settings.options.model_dump()}
    return [Side("ours", chosen), *theirs(architecture, setup)]


def theirs(architecture: str, setup: RecoverySetup) -> list[Side]:
    root, k = setup.d_in**0.5, round(setup.active)
    matched = float(2e-4 * (16384 / setup.features) ** 0.5)
    widths = [setup.features // part for part in (16, 8, 4, 2, 1)]
    options: dict[str, list[dict[str, Any]]] = {
        "standard": [{"l1_coefficient": 0.1 * root}, {"l1_coefficient": 0.05 * root}],
        "gated": [{"l1_coefficient": 0.25 * root}, {"l1_coefficient": 0.15 * root}],
        "topk": [{"k": k}],
        "batchtopk": [{"k": k}, {"k": k, "dead_feature_window": 20}],
        "matryoshka": [
            {"k": k, "matryoshka_widths": list(widths)},
            {"k": k, "matryoshka_widths": list(widths), "dead_feature_window": 20},
        ],
        "jumprelu": [
            {
                "jumprelu_sparsity_loss_mode": "quadratic",
                "target_l0": setup.active,
                "l0_coefficient": 0.005 * setup.d_in,
                "jumprelu_bandwidth": 0.15 * root,
                "jumprelu_init_threshold": 1.0,
            },
            {"l0_coefficient": 1.0, "jumprelu_bandwidth": 1.0, "jumprelu_init_threshold": 0.1},
        ],
    }
    return [Side("saelens", {"lr": lr, **one}) for one in options[architecture] for lr in (3e-4, matched)]


def toy(setup: RecoverySetup, seeds: Sequence[int], advance: Callable[[str], None]) -> list[dict[str, Any]]:
    """Recovery of the planted dictionary: for each architecture and side, its settings and mean scores."""
    rows = []
    for architecture in RECOVERED:
        for side in sides(architecture, setup):
            started = time.perf_counter()
            scores = []
            for seed in seeds:
                advance(f"{architecture}, {side.name}")
                scores.append(_toy_scores(architecture, side, replace(setup, seed=seed)))
            rows.append(
                {
                    "architecture": architecture,
                    "side": side.name,
                    "settings": dict(side.settings),
                    **{name: round(mean(one[name] for one in scores), 4) for name in _SCORES},
                    "seconds": round(time.perf_counter() - started, 1),
                }
            )
    return rows


def _toy_scores(architecture: str, side: Side, setup: RecoverySetup) -> dict[str, float]:
    if side.name == "ours":
        found = recover(architecture, setup, options=side.settings)
        return {name: getattr(found, name) for name in _SCORES}
    data = planted_data(setup)
    sae = train_saelens(
        architecture,
        data.batches(setup.batch, setup.seed),
        d_in=setup.d_in,
        d_sae=setup.features,
        steps=setup.steps,
        batch=setup.batch,
        seed=setup.seed,
        settings=side.settings,
    )
    measured = evaluate(sae, [next(data.batches(_HELD_OUT, _HELD_OUT_SEED))])
    recovery = judge_dictionary(sae.decoder, data.features)
    return {
        "mmcs": recovery.mmcs,
        "mcc": recovery.mcc,
        "explained_variance": measured.explained_variance,
        "l0": measured.l0,
        "dead_fraction": measured.dead_fraction,
    }


def synth(
    steps: int, batch: int, seeds: Sequence[int], advance: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The small SynthSAEBench: SAELens' own metrics of both sides."""
    setup = RecoverySetup(synthetic.D_IN, synthetic.D_SAE, _SYNTHETIC_K, steps, batch)
    rows = []
    for architecture in _SYNTHETIC:
        for side in sides(architecture, setup):
            scores = []
            for seed in seeds:
                advance(f"SynthSAEBench, {architecture}, {side.name}")
                scores.append(_synth_scores(architecture, side, replace(setup, seed=seed)))
            means = {name: round(mean(one[name] for one in scores), 4) for name in scores[0]}
            row = {"architecture": architecture, "side": side.name, "settings": dict(side.settings)}
            rows.append({**row, **means})
    return rows


def _synth_scores(architecture: str, side: Side, setup: RecoverySetup) -> dict[str, float]:
    world = synthetic.build_world(setup.seed)
    source = synthetic.batches(world, setup.batch, setup.seed)
    if side.name == "ours":
        settings = settings_for(architecture, setup, side.settings)
        return synthetic.judge(world, synthetic.OurAdapter(train_on(source, [settings])[0]))
    sae = train_saelens(
        architecture,
        source,
        d_in=setup.d_in,
        d_sae=setup.features,
        steps=setup.steps,
        batch=setup.batch,
        seed=setup.seed,
        settings=side.settings,
    )
    return synthetic.judge(world, sae.sae)


def compared(rows: Sequence[Mapping[str, Any]], scores: Sequence[str]) -> list[dict[str, Any]]:
    """For each architecture, ours minus the best of SAELens' settings (by MCC), score by score."""
    found = []
    for name in dict.fromkeys(row["architecture"] for row in rows):
        here = [row for row in rows if row["architecture"] == name]
        best = max((row for row in here if row["side"] == "saelens"), key=lambda row: row["mcc"])
        own = next(row for row in here if row["side"] == "ours")
        found.append({"architecture": name, **{s: round(own[s] - best[s], 4) for s in scores}})
    return found


def main(
    steps: Annotated[int, typer.Option(min=10, help="Steps of each SAE.")] = 3000,
    batch: Annotated[int, typer.Option(min=2, help="Samples per step.")] = 1024,
    seed: Annotated[list[int] | None, typer.Option(help="May be given several times.")] = None,
    small: Annotated[bool, typer.Option(help="64 features in 32 dimensions, for a slow machine.")] = False,
    out: Annotated[Path, typer.Option(help="Where the JSON is kept, besides being printed.")] = (
        RESULTS / "recovery.json"
    ),
) -> None:
    """Train every architecture by both trainers on planted features, and count what was found."""
    torch.set_num_threads(max(1, torch.get_num_threads()))
    setup = RecoverySetup(steps=steps, batch=batch)
    if small:
        setup = replace(setup, d_in=32, features=64, active=3.0)
    seeds, before = seed or [0], load_average()
    runs = sum(len(sides(name, setup)) for name in (*RECOVERED, *_SYNTHETIC)) * len(seeds)
    with progress_bar() as bar:
        task = bar.add_task("recovery", total=runs, detail="")

        def advance(detail: str) -> None:
            bar.update(task, advance=1, detail=detail)

        planted = toy(setup, seeds, advance)
        bench = synth(steps, batch, seeds, advance)
    results = {
        "machine": machine(),
        "load_average": [before, load_average()],
        "seeds": seeds,
        "toy": {"setup": asdict(setup), "rows": planted, "difference": compared(planted, _SCORES[:3])},
        "synth": {
            "rows": bench,
            "difference": compared(bench, ("f1", "mcc", "explained_variance", "l0")),
        },
    }
    publish(results, out)


if __name__ == "__main__":
    typer.run(main)
