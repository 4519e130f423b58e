"""The experiments themselves, small: what was planted is found, and the same seed finds the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from steerserve.errors import ConfigError
from steerserve.experiments import functional, tensor
from steerserve.experiments.command import app, rows
from steerserve.experiments.field_run import FieldRun
from steerserve.experiments.fields import ShiftedSums, curves
from steerserve.experiments.fit import Recipe, fit
from steerserve.experiments.flat import FlatSae, parameter_count
from steerserve.experiments.images import bars
from steerserve.experiments.planted import SparseSums
from steerserve.experiments.recovery import cosines, explained_variance, mmcs, shifted_cosines
from steerserve.sae.architectures.functional import FunctionalSae, from_modes
from steerserve.sae.architectures.tensor import TensorSae

Runs = Mapping[str, Sequence[tensor.ImageRun | FieldRun]]


@pytest.fixture(scope="module")
def runs() -> Runs:
    """Both experiments after a single step."""
    return {"tensor": tensor.run(1, 0).runs, "functional": functional.run(1, 0).runs}


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_tensor_sae_finds_the_planted_bars() -> None:
    planted = bars(12, 8, draw())
    x, clean = SparseSums(planted, active=2.0, noise=0.02).sample(3000, draw(1))
    sae = TensorSae((3, 8, 8), 16, l1=0.1, generator=draw(2))
    before = mmcs(cosines(planted, sae.atoms()))
    losses = fit(sae, x, Recipe(steps=800, batch=128, lr=5e-3, seed=0))
    assert losses[-1] < losses[0] / 4
    assert before < 0.3
    assert mmcs(cosines(planted, sae.atoms())) > 0.97
    assert explained_variance(clean, sae(x)) > 0.97


def test_a_functional_sae_finds_the_planted_kernels_and_serves_other_grids() -> None:
    source = ShiftedSums(curves(16)[:3], (16,), active=1.5)
    x = source.sample(2000, draw()).on_grid((48,))
    sae = FunctionalSae((16,), 1, 4, concept_price=0.005, domain_price=0.1, generator=draw(2))
    fit(sae, x, Recipe(steps=500, batch=64, lr=2e-2, seed=0))
    planted = from_modes(source.kernels, (16,), (192,))
    assert mmcs(shifted_cosines(planted, sae.kernels((192,)))) > 0.9
    held_out = source.sample(500, draw(3))
    for grid in ((48,), (37,), (96,)):
        unseen = held_out.on_grid(grid)
        assert explained_variance(unseen, sae(unseen)) > 0.8


def test_the_same_seed_gives_the_same_sae_bit_for_bit() -> None:
    def trained() -> TensorSae:
        x, _ = SparseSums(bars(6, 8, draw()), active=2.0, noise=0.02).sample(300, draw(1))
        sae = TensorSae((3, 8, 8), 8, l1=0.1, generator=draw(2))
        fit(sae, x, Recipe(steps=20, batch=32, lr=1e-2, seed=5))
        return sae

    one, two = trained(), trained()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_flat_sae_has_the_parameters_it_is_said_to_have() -> None:
    assert parameter_count(FlatSae((3, 4), 5, l1=0.1)) == 5 * (12 + 12 + 1) + 12


@pytest.mark.parametrize("kind", ["tensor", "functional"])
def test_the_flat_sae_of_equal_parameters_has_no_more_and_not_one_atom_less(kind: str, runs: Runs) -> None:
    mine = next(run for run in runs[kind] if run.model == kind)
    flat = next(run for run in runs[kind] if (run.data, run.model) == (mine.data, "flat, equal parameters"))
    per_atom = flat.parameters // flat.latents
    assert flat.parameters <= mine.parameters < flat.parameters + per_atom


@pytest.mark.parametrize("name", ["tensor", "functional"])
def test_the_command_writes_its_numbers_and_its_plot(name: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = CliRunner().invoke(app, [name, "--out", str(out), "--steps", "2", "--seed", "3"])
    assert result.exit_code == 0, result.output
    report = json.loads((out / f"{name}.json").read_text())
    assert (report["experiment"], report["steps"], report["seed"]) == (name, 2, 3)
    assert {run["model"] for run in report["runs"]} >= {name, "flat, equal parameters"}
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_a_file_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["tensor", "--out", str(tmp_path / "file")])
    assert isinstance(result.exception, ConfigError)
    assert "expected a folder to write at --out" in str(result.exception)


@pytest.mark.parametrize("kind", ["tensor", "functional"])
def test_rows_are_plain_values(kind: str, runs: Runs) -> None:
    assert json.loads(json.dumps(rows(runs[kind]))) == rows(runs[kind])
