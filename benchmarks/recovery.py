"""Known features found again: our trainer beside SAELens', same data, steps, batch and seeds; JSON.

python -m benchmarks.recovery --part toy --seed 2 --seed 3
python -m benchmarks.recovery --part synth
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, Literal

import torch
import typer

from steerserve.judging.dictionary import judge_dictionary
from steerserve.theory.recovery import RECOVERED, RecoverySetup, planted_data, recover, settings_for
from steerserve.training.evaluate import evaluate
from steerserve.training.generated import train_on

from . import synthetic
from .command import RESULTS, keep, progress_bar, publish
from .machine import load_average, machine
from .saelens_training import train_saelens

__all__ = ["main"]

SYNTHETIC = ("batchtopk", "matryoshka")
Part = Literal["toy", "synth"]
_SYNTHETIC_K = 6
# Half as much again as by default: a little more of the variance, for a little less of the features.
_SYNTHETIC_LR = 2.4e-3
_SYNTHETIC_SCORES = ("f1", "mcc", "explained_variance", "l0")
_HELD_OUT, _HELD_OUT_SEED = 8192, 1_000_003
_SCORES = ("mmcs", "mcc", "explained_variance", "l0", "dead_fraction")


@dataclass(frozen=True)
class Side:
    """One trainer with its settings; where one has several, its best by MCC counts."""

    name: str
    settings: Mapping[str, Any]


def sides(architecture: str, setup: RecoverySetup, own: Mapping[str, Any]) -> list[Side]:
    """Ours with one setting, SAELens' with several: its documented learning rate, and ours in its own units.

    SAELens scales inputs to a mean norm of √d, where we scale to 1: a penalty of ours is √d (L1) or d (L0)
    times as large in its units, a bandwidth or a threshold √d.
    """
    settings = settings_for(architecture, setup, own)
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
    first, *others = options[architecture]
    documented = {"lr": 3e-4, **first}
    return [Side("saelens", one) for one in (documented, *({"lr": matched, **o} for o in (first, *others)))]


Scores = Callable[[str, Side, RecoverySetup], dict[str, float]]


def _row(
    architecture: str, side: Side, setup: RecoverySetup, seeds: Sequence[int], scores_of: Scores
) -> dict[str, Any]:
    """A side's settings and its mean scores."""
    started = time.perf_counter()
    scores = [scores_of(architecture, side, replace(setup, seed=seed)) for seed in seeds]
    return {
        "architecture": architecture,
        "side": side.name,
        "settings": dict(side.settings),
        **{name: round(mean(one[name] for one in scores), 4) for name in scores[0]},
        "by_seed": scores,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _toy_scores(architecture: str, side: Side, setup: RecoverySetup) -> dict[str, float]:
    """How much of the planted dictionary was recovered."""
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


def _synth_scores(architecture: str, side: Side, setup: RecoverySetup) -> dict[str, float]:
    """SAELens' own metrics of a side on the small SynthSAEBench."""
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
        best = max((row for row in here if row["side"] == "saelens"), key=_mcc, default=None)
        own = next(row for row in here if row["side"] == "ours")
        if best is not None:
            found.append({"architecture": name, **{s: round(own[s] - best[s], 4) for s in scores}})
    return found


def _mcc(row: Mapping[str, Any]) -> float:
    return float(row["mcc"])


def main(
    steps: Annotated[int, typer.Option(min=10, help="Steps of each SAE.")] = 3000,
    batch: Annotated[int, typer.Option(min=2, help="Samples per step.")] = 1024,
    seed: Annotated[list[int] | None, typer.Option(help="May be given several times.")] = None,
    part: Annotated[Part, typer.Option(help="What to recover from.")] = "toy",
    small: Annotated[bool, typer.Option(help="Toy: 64 features in 32 dimensions.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the JSON is kept; recovery-PART.json if not given.")
    ] = None,
) -> None:
    """Train by both trainers on planted features, and count what was found.

    The toy takes an hour with two seeds, SynthSAEBench as long with one. Every row is kept when it is done,
    and the command goes on behind those that the file holds already; rows of other settings are dropped.
    """
    seeds, before = seed or [0], load_average()
    place = out or RESULTS / f"recovery-{part}.json"
    setup, architectures, own, scores_of, compared_by = _parts(steps, batch, small)[part]
    fixed = {"machine": machine(), "threads": torch.get_num_threads(), "seeds": seeds, "setup": asdict(setup)}
    known, rows = _kept(place, fixed), list[dict[str, Any]]()

    def results() -> dict[str, Any]:
        loads = {"load_average": [before, load_average()]}
        return {**fixed, **loads, "rows": rows, "difference": compared(rows, compared_by)}

    def so_far() -> dict[str, Any]:
        """With the rows that are known and whose turn has not come: a call that is cut short loses none."""
        return {**results(), "rows": [*rows, *(row for row in known.values() if row not in rows)]}

    work = [(name, side) for name in architectures for side in sides(name, setup, own)]
    with progress_bar() as bar:
        task = bar.add_task(f"recovery, {part}", total=len(work), detail="")
        for name, side in work:
            bar.update(task, advance=1, detail=f"{name}, {side.name}")
            settings = json.loads(json.dumps(dict(side.settings)))
            row = known.get(json.dumps([name, side.name, settings]))
            rows.append(row or _row(name, side, setup, seeds, scores_of))
            keep(so_far(), place)
    publish(results(), place)


def _kept(place: Path, fixed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of an earlier call for the same, by what they are of."""
    if not place.exists():
        return {}
    found = json.loads(place.read_text(encoding="utf-8"))
    if any(found.get(name) != value for name, value in fixed.items()):
        return {}
    return {json.dumps([row["architecture"], row["side"], row["settings"]]): row for row in found["rows"]}


def _parts(steps: int, batch: int, small: bool) -> dict[Part, tuple[Any, ...]]:
    """By name: the setup, architectures, settings of ours, what scores them, the scores that are compared."""
    planted = RecoverySetup(steps=steps, batch=batch)
    if small:
        planted = replace(planted, d_in=32, features=64, active=3.0)
    bench = RecoverySetup(synthetic.D_IN, synthetic.D_SAE, _SYNTHETIC_K, steps, batch)
    return {
        "toy": (planted, RECOVERED, {}, _toy_scores, _SCORES[:3]),
        "synth": (bench, SYNTHETIC, {"lr": _SYNTHETIC_LR}, _synth_scores, _SYNTHETIC_SCORES),
    }


if __name__ == "__main__":
    typer.run(main)
