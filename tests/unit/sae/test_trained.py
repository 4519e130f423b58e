"""The SAEs that our trainer alone saves, against their papers' formulas; and what makes one unreadable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae import Hook, open_sae
from steerserve.sae.formats import recognise
from steerserve.sae.resident import Resident
from tests.support.plain import Plain
from tests.support.saes import make_trained

D_IN, D_SAE, K = 24, 96, 6
KINDS = ["kron", "switch", "vaease"]
TENSORS = {
    "kron": ["W_dec", "W_left", "W_right", "b_dec", "b_left", "b_right"],
    "switch": ["W_dec", "W_enc", "W_router", "b_dec", "b_router"],
    "vaease": ["W_dec", "W_enc", "W_gate", "b_dec", "b_enc", "b_gate"],
}
EVERY_TENSOR = [(kind, name) for kind, names in TENSORS.items() for name in names]


@pytest.fixture
def stream() -> Tensor:
    return torch.randn(60, D_IN, generator=torch.Generator().manual_seed(1)) * 2


def _make(folder: Path, kind: str) -> Path:
    return make_trained(folder, kind, 3, d_in=D_IN, d_sae=D_SAE, k=K, parts=(4, 6))


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_reconstruction_follow_the_papers_formula(
    kind: str, tmp_path: Path, stream: Tensor
) -> None:
    plain, ours = Plain(_make(tmp_path, kind)), Resident.of(open_sae(tmp_path))
    wanted = plain.encode(stream)
    encoded = ours.encode(stream)
    assert torch.equal(encoded.f != 0, wanted != 0)
    torch.testing.assert_close(encoded.f, wanted, atol=1e-5, rtol=1e-5)
    decoded = plain.decode(wanted)
    torch.testing.assert_close(ours.decode(encoded.f, encoded), decoded, atol=1e-5, rtol=1e-5)
    f, reconstruction = ours.autoencode(stream)
    assert torch.equal(f, encoded.f)
    torch.testing.assert_close(reconstruction, decoded, atol=1e-5, rtol=1e-5)
    active = (encoded.f != 0).sum(1)
    assert int(active.min()) > 0
    assert kind == "vaease" or int(active.max()) == K


@pytest.mark.parametrize("kind", KINDS)
def test_its_kind_and_hook_are_known_and_why_it_must_be_resident(kind: str, tmp_path: Path) -> None:
    sae = open_sae(_make(tmp_path, kind))
    assert recognise(tmp_path).layout == "steerserve"
    assert recognise(tmp_path / "sae_weights.safetensors").layout == "steerserve"
    facts = (sae.architecture, sae.d_in, sae.d_sae, sae.hook)
    assert facts == (kind, D_IN, D_SAE, Hook(3, "resid_post"))
    assert sae.refusal is None
    assert sae.needs_resident is not None
    assert not sae.per_feature
    assert sae.top_k == (None if kind == "vaease" else K)
    with pytest.raises(CheckpointError, match="use Resident"):
        sae.encode(torch.zeros(1, D_IN))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_hold_the_decoder(kind: str, tmp_path: Path) -> None:
    sae, whole = open_sae(_make(tmp_path, kind)), load_file(tmp_path / "sae_weights.safetensors")
    rows = sae.rows([7, 70])
    assert torch.equal(rows.decoder, whole["W_dec"][[7, 70]])
    assert all(torch.isfinite(part).all() for part in (rows.encoder, rows.bias, rows.scale))


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("kron", 2 * D_IN * 4 * (4 + 6)),
        ("switch", 2 * D_IN * (4 + D_SAE // 4)),
        ("vaease", 2 * D_IN * 2 * D_SAE),
    ],
)
def test_what_it_costs_is_what_its_encoder_does(kind: str, flops: int, tmp_path: Path) -> None:
    ours = Resident.of(open_sae(_make(tmp_path, kind)))
    assert ours.flops_per_token == flops
    on_disk = sum(4 * part.numel() for part in load_file(tmp_path / "sae_weights.safetensors").values())
    # Besides what is on disk: the pre-bias, and a switch SAE's six constants of each feature.
    assert ours.nbytes == on_disk + 4 * D_IN + 4 * 6 * D_SAE * (kind == "switch")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_not_finite_spoils_only_itself(
    kind: str, bad: float, tmp_path: Path, stream: Tensor
) -> None:
    ours = Resident.of(open_sae(_make(tmp_path, kind)))
    spoilt = stream[:8].clone()
    spoilt[3, 5] = bad
    encoded = ours.encode(spoilt)
    sound = encoded.f.sum(1).isfinite() & encoded.gain.isfinite()
    assert torch.equal(sound, torch.arange(8) != 3)
    torch.testing.assert_close(encoded.f[:3], ours.encode(stream[:8]).f[:3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "name"), EVERY_TENSOR)
def test_a_tensor_that_is_missing_or_misshapen_or_not_finite_is_refused(
    kind: str, name: str, tmp_path: Path
) -> None:
    path = _make(tmp_path, kind) / "sae_weights.safetensors"
    whole = load_file(path)
    spoilt = whole[name].clone()
    spoilt.view(-1)[3] = torch.nan
    fewer = {key: value for key, value in whole.items() if key != name}
    for tensors in (fewer, {**whole, name: whole[name][..., :-1].contiguous()}, {**whole, name: spoilt}):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match="expected"):
            open_sae(tmp_path)


@pytest.mark.parametrize(("kind", "name"), EVERY_TENSOR)
def test_a_weight_that_is_not_finite_is_found_on_the_way_to_the_device(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerserve.sae.formats.common.check_finite", lambda *_: None)
    path = _make(tmp_path, kind) / "sae_weights.safetensors"
    whole = load_file(path)
    whole[name].view(-1)[3] = torch.inf
    save_file(whole, path)
    with pytest.raises(CheckpointError, match="finite"):
        Resident.of(open_sae(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_too_many_is_refused(kind: str, tmp_path: Path) -> None:
    path = _make(tmp_path, kind) / "sae_weights.safetensors"
    save_file({**load_file(path), "threshold": torch.zeros(D_SAE)}, path)
    with pytest.raises(CheckpointError, match="no such tensor") as caught:
        open_sae(tmp_path)
    assert caught.value.tensor == "threshold"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("kron", {"heads": 3}),
        ("kron", {"base": 6, "extension": 4}),
        ("kron", {"base": "4"}),
        ("kron", {"k": 0}),
        ("kron", {"k": D_SAE + 1}),
        ("switch", {"experts": 5}),
        ("switch", {"experts": 8}),
        ("switch", {"k": None}),
        ("vaease", {"d_in": D_IN + 1}),
        ("vaease", {"d_sae": D_SAE - 1}),
        ("vaease", {"metadata": []}),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(
    kind: str, change: dict[str, Any], tmp_path: Path
) -> None:
    _change(_make(tmp_path, kind), **change)
    with pytest.raises(CheckpointError, match="expected"):
        open_sae(tmp_path)


def test_an_sae_of_another_site_is_not_served(tmp_path: Path) -> None:
    _change(_make(tmp_path, "kron"), metadata={"hook_name": "blocks.2.hook_mlp_out"})
    assert "hook_mlp_out" in (open_sae(tmp_path).refusal or "")


def test_half_precision_weights_are_encoded_in_float32(tmp_path: Path, stream: Tensor) -> None:
    path = _make(tmp_path, "kron") / "sae_weights.safetensors"
    half = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}
    save_file(half, path)
    f = Resident.of(open_sae(tmp_path)).encode(stream).f
    save_file({name: tensor.float() for name, tensor in half.items()}, path)
    torch.testing.assert_close(f, Plain(tmp_path).encode(stream), atol=1e-5, rtol=1e-5)
