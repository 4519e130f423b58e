"""`sae convert`: what comes out, SAELens itself loads, with the activations of what went in."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from steerserve.cli import app
from steerserve.errors import CheckpointError, ConfigError
from steerserve.sae import Hook, Manifest, open_sae, verify_sae, write_manifest
from steerserve.sae.convert import convert_sae
from steerserve.sae.files import sha256_of
from steerserve.sae.formats import common, saelens_writer
from steerserve.sae.resident import Resident
from tests.support.saes import load_sae, make_sae, make_switch

from .layouts import (
    D_IN,
    D_SAE,
    LAYOUTS,
    Written,
    dictionary_learning,
    llama_scope,
    qwen_scope,
    sparsify,
    stream,
)

REAL = Path(__file__).parent / "fixtures"
HOOK = Hook(3, "resid_post")


def _real(name: str) -> Written:
    expected = load_file(REAL / name / "expected.safetensors")
    return Written(REAL / name, expected["x"], expected["f"], expected["out"])


def _same(got: Tensor, expected: Tensor) -> None:
    """Within 1e-6 of the largest number."""
    assert float((got - expected).abs().max()) <= 1e-6 * max(1.0, float(expected.abs().max()))


def _check(written: Written, out: Path) -> None:
    """SAELens' own features and reconstruction of what was converted, and ours of it."""
    theirs = load_sae(out)
    with torch.no_grad():
        f = theirs.encode(written.x)
        decoded = theirs.decode(f)
    assert torch.equal(f > 0, written.f > 0)
    _same(f, written.f)
    _same(decoded, written.out)
    ours = Resident.of(open_sae(out)).encode(written.x)
    _same(ours.f, f)


@pytest.mark.parametrize("name", LAYOUTS)
def test_saelens_loads_what_every_layout_becomes_with_the_same_activations(name: str, tmp_path: Path) -> None:
    written = LAYOUTS[name](tmp_path / "in")
    source = open_sae(written.path)
    convert_sae(written.path, tmp_path / "out", model="tiny")
    _check(written, tmp_path / "out")
    sae = verify_sae(tmp_path / "out")
    assert (sae.architecture, sae.hook, sae.top_k) == (source.architecture, source.hook, source.top_k)
    assert sae.manifest is not None
    assert (sae.manifest.model.name, sae.manifest.finite) == ("tiny", True)


@pytest.mark.parametrize("name", sorted(path.name for path in (REAL / "dictionary_learning").iterdir()))
def test_saelens_computes_of_every_dictionary_what_its_library_computes(name: str, tmp_path: Path) -> None:
    written = _real(f"dictionary_learning/{name}")
    convert_sae(written.path, tmp_path / "out", hook=HOOK)
    _check(written, tmp_path / "out")
    metadata = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    assert metadata["model_name"] == "tiny"
    assert metadata["hook_name"] == "blocks.3.hook_resid_post"


def test_saelens_computes_of_sparsifys_folder_what_sparsify_computes(tmp_path: Path) -> None:
    written = _real("sparsify/layers.3")
    convert_sae(written.path, tmp_path / "out", model="tiny")
    _check(written, tmp_path / "out")


@pytest.mark.parametrize(
    "settings", [{}, {"rescale_acts_by_decoder_norm": True}, {"normalize_activations": "layer_norm"}]
)
@pytest.mark.parametrize("seed", [0, 1], ids=["b_dec subtracted", "b_dec not subtracted"])
def test_saelens_top_k_survives_whatever_its_settings(
    settings: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    make_sae(tmp_path / "in", "topk", 3, seed=seed, d_in=D_IN, d_sae=D_SAE, **settings)
    theirs, x = load_sae(tmp_path / "in"), stream()
    with torch.no_grad():
        f = theirs.encode(x)
        written = Written(tmp_path / "in", x, f, theirs.decode(f))
    convert_sae(tmp_path / "in", tmp_path / "out")
    _check(written, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_precision_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    written = llama_scope(tmp_path / "in")
    path = written.path / "checkpoints" / "final.safetensors"
    save_file({name: part.to(dtype) for name, part in load_file(path).items()}, path)
    convert_sae(written.path, tmp_path / "out")
    assert {part.dtype for part in load_file(tmp_path / "out" / "sae_weights.safetensors").values()} == {
        torch.float32
    }
    before, after = Resident.of(open_sae(written.path)), Resident.of(open_sae(tmp_path / "out"))
    _same(after.encode(written.x).f, before.encode(written.x).f)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_large_file_is_converted_block_by_block(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = LAYOUTS[name](tmp_path / "in")
    convert_sae(written.path, tmp_path / "whole", model="tiny")
    monkeypatch.setattr(common, "OPENED_WHOLE", 0)
    monkeypatch.setattr(saelens_writer, "_NUMBERS_AT_ONCE", 7 * D_IN)
    heard: list[tuple[int, int]] = []
    convert_sae(written.path, tmp_path / "blocks", model="tiny", progress=lambda *told: heard.append(told))
    weights = "sae_weights.safetensors"
    assert sha256_of(tmp_path / "blocks" / weights) == sha256_of(tmp_path / "whole" / weights)
    assert heard == sorted(heard)
    assert len(heard) > D_SAE // 7


def test_statistics_labels_and_the_models_hash_are_kept(tmp_path: Path) -> None:
    folder = make_sae(tmp_path / "in", "jumprelu", 3, d_in=D_IN, d_sae=D_SAE)
    stats = {"max_activation": torch.arange(D_SAE) + 1.0, "firing_rate": torch.full((D_SAE,), 0.1)}
    save_file(stats, folder / "stats.safetensors")
    names = ("sae_weights.safetensors", "stats.safetensors")
    said = {
        "model": {"name": "tiny", "sha256": "0" * 64},
        "hook": {"layer": 3, "site": "resid_post"},
        "d_in": D_IN,
        "d_sae": D_SAE,
        "architecture": "jumprelu",
        "files": {name: sha256_of(folder / name) for name in names},
        "labels": [{"feature": 2, "label": "towns"}],
        "training": {"tokens": 5},
    }
    manifest = Manifest.model_validate(said)
    write_manifest(folder, manifest)
    save_file({"sparsity": torch.full((D_SAE,), -2.0)}, folder / "sparsity.safetensors")
    convert_sae(folder, tmp_path / "out")
    sae = verify_sae(tmp_path / "out")
    assert sae.max_activation(2) == 3.0
    assert sae.manifest is not None
    assert (sae.manifest.labels, sae.manifest.training) == (manifest.labels, manifest.training)
    assert sae.manifest.model == manifest.model
    assert set(sae.manifest.files) == {*names, "cfg.json", "sparsity.safetensors"}


def test_what_saelens_cannot_express_is_refused_with_the_reason(tmp_path: Path) -> None:
    refused: dict[str, Callable[[Path], Path]] = {
        "switch": lambda folder: make_switch(folder, 3, d_in=D_IN, d_sae=D_SAE),
        "groupmax": lambda folder: sparsify(folder, activation="groupmax").path,
        "transcoder": lambda folder: sparsify(folder, transcode=True).path,
        "L0_50": lambda folder: qwen_scope(folder, "SAE-Res-X").path,
    }
    for reason, write in refused.items():
        with pytest.raises(CheckpointError, match=reason):
            convert_sae(write(tmp_path / reason), tmp_path / "out", model="tiny")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    written = dictionary_learning(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="not there yet"):
        convert_sae(written.path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_without_model_or_hook_it_is_asked_for(tmp_path: Path) -> None:
    written = dictionary_learning(tmp_path / "in")
    (written.path / "config.json").write_text('{"trainer": {"dict_class": "BatchTopKSAE"}}')
    with pytest.raises(CheckpointError, match="--hook"):
        convert_sae(written.path, tmp_path / "out", model="tiny")
    with pytest.raises(CheckpointError, match="--model"):
        convert_sae(written.path, tmp_path / "out", hook=HOOK)
    convert_sae(written.path, tmp_path / "out", model="tiny", hook=HOOK)
    assert open_sae(tmp_path / "out").hook == HOOK


def test_a_hook_that_contradicts_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"blocks\.3\.hook_resid_post"):
        convert_sae(dictionary_learning(tmp_path / "in").path, tmp_path / "out", hook=Hook(4, "resid_post"))


@pytest.mark.parametrize("name", ["encoder.weight", "decoder.weight", "encoder.bias"])
def test_a_weight_that_is_not_finite_leaves_nothing_behind(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dictionary_learning(tmp_path / "in").path
    content = torch.load(folder / "ae.pt", weights_only=True)
    content[name].view(-1)[11] = torch.inf
    torch.save(content, folder / "ae.pt")
    monkeypatch.setattr(common, "OPENED_WHOLE", 0)
    with pytest.raises(CheckpointError, match="finite"):
        convert_sae(folder, tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_is_an_error_that_leaves_nothing_behind(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = dictionary_learning(tmp_path / "in").path
    monkeypatch.setattr(os, call, full)
    with pytest.raises(CheckpointError, match="No space left"):
        convert_sae(folder, tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["in"]


def test_the_command_converts_and_says_what_it_wrote(tmp_path: Path) -> None:
    written = dictionary_learning(tmp_path / "in")
    done = CliRunner().invoke(app, ["sae", "convert", str(written.path), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "every weight finite" in done.output
    shown = CliRunner().invoke(app, ["sae", "inspect", str(tmp_path / "out"), "--json"])
    facts = json.loads(shown.output)
    assert (facts["layout"], facts["architecture"]) == ("SAELens", "batchtopk")
    wrong = CliRunner().invoke(
        app, ["sae", "convert", str(written.path), str(tmp_path / "o"), "--hook", "mlp"]
    )
    assert isinstance(wrong.exception, ConfigError)
