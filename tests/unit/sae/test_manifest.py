from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from steerserve.errors import CheckpointError
from steerserve.sae import Hook, Manifest, open_sae, read_manifest, write_manifest
from steerserve.sae.files import sha256_of

from .conftest import D_IN, D_SAE, Make

SHA = st.text("0123456789abcdef", min_size=64, max_size=64)
NAME = st.text(string.ascii_letters + string.digits, min_size=1, max_size=20)
NUMBER = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53)
LABEL = st.fixed_dictionaries(
    {"feature": st.integers(0, 9), "label": st.text(min_size=1, max_size=40)},
    optional={"domain": st.none() | NAME, "f1": st.none() | st.floats(0, 1)},
)
MANIFEST = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"name": NAME}, optional={"sha256": SHA}),
        "hook": st.fixed_dictionaries(
            {"layer": st.integers(0, 99), "site": st.sampled_from(["resid_pre", "resid_post"])}
        ),
        "d_in": st.integers(1, 2**20),
        "d_sae": st.integers(10, 2**24),
        "architecture": NAME,
        "files": st.dictionaries(NAME, SHA, max_size=3),
    },
    optional={
        "finite": st.booleans(),
        "labels": st.lists(LABEL, max_size=3),
        "training": st.dictionaries(NAME, NUMBER, max_size=3),
    },
)


@given(said=MANIFEST)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_back(said: dict[str, object], tmp_path: Path) -> None:
    manifest = Manifest.model_validate(said)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def _said() -> dict[str, object]:
    return {
        "format": 1,
        "model": {"name": "demo"},
        "hook": {"layer": 3, "site": "resid_post"},
        "d_in": 4,
        "d_sae": 8,
        "architecture": "standard",
        "files": {},
    }


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"format": 2}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"d_in": "4"}, "d_in"),
        ({"d_sae": True}, "d_sae"),
        ({"hook": {"layer": -1, "site": "resid_post"}}, "hook.layer"),
        ({"hook": {"layer": 1, "site": "mlp"}}, "hook.site"),
        ({"files": {"../x": "0" * 64}}, "files"),
        ({"files": {"x": "00"}}, "files.x"),
        ({"labels": [{"feature": 0, "label": "x", "f1": 1.5}]}, "labels.0.f1"),
        ({"labels": [{"feature": 8, "label": "x"}]}, "labelled features < 8"),
        ({"training": {"l0": "many"}}, "training.l0"),
    ],
)
def test_a_malformed_manifest_is_refused_with_the_place(
    change: dict[str, object], where: str, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({**_said(), **change}))
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    assert where in str(caught.value)


def test_a_manifest_with_nan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({**_said(), "training": {"l0": float("nan")}}))
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path)


def test_no_manifest_is_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


def test_statistics_are_read_by_feature(make: Make) -> None:
    _, folder = make("jumprelu")
    stats = {"max_activation": torch.arange(D_SAE).float(), "firing_rate": torch.full((D_SAE,), 0.25)}
    save_file(stats, folder / "stats.safetensors")
    names = ["sae_weights.safetensors", "stats.safetensors"]
    said = {
        **_said(),
        "d_in": D_IN,
        "d_sae": D_SAE,
        "architecture": "jumprelu",
        "files": {name: sha256_of(folder / name) for name in names},
        "finite": True,
    }
    write_manifest(folder, Manifest.model_validate(said))
    sae = open_sae(folder)
    assert (sae.max_activation(7), sae.firing_rate(7)) == (7.0, 0.25)
    assert sae.hook == Hook(3, "resid_post")


def test_without_statistics_there_is_no_maximum(make: Make) -> None:
    _, folder = make("jumprelu")
    assert open_sae(folder).max_activation(0) is None
