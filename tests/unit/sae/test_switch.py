"""Switch SAEs against the paper's formula token by token, and everything that makes one unreadable."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae import Hook, open_sae
from steerserve.sae.resident import Resident
from tests.support.saes import make_switch

D_IN, D_SAE, EXPERTS, K = 24, 80, 5, 6
SIZE = D_SAE // EXPERTS


@pytest.fixture
def stream() -> Tensor:
    return torch.randn(60, D_IN, generator=torch.Generator().manual_seed(1)) * 2


def _make(folder: Path, **settings: Any) -> Path:
    return make_switch(folder, 3, d_in=D_IN, d_sae=D_SAE, **{"experts": EXPERTS, "k": K, **settings})


def _tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(folder / "ae.pt", weights_only=True)
    return tensors


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    trainer = json.loads(path.read_text())["trainer"]
    path.write_text(json.dumps({"trainer": {**trainer, **changes}}))


def _plain(t: dict[str, Tensor], x: Tensor, heaviside: bool) -> tuple[int, float, Tensor, Tensor]:
    """One token: expert, gain, features, reconstruction (arXiv:2410.08201, section 3)."""
    p = torch.softmax(t["router.weight"] @ (x - t["b_router"]), dim=0)
    expert = int(p.argmax())
    gain = 1.0 if heaviside else float(p[expert])
    own = torch.arange(expert * SIZE, (expert + 1) * SIZE)
    pre = torch.relu(t["encoder.weight"][own] @ (x - t["b_dec"]))
    kept = pre.topk(min(K, SIZE)).indices
    f = torch.zeros(D_SAE)
    f[own[kept]] = pre[kept]
    return expert, gain, f, gain * (f @ t["decoder"]) + t["b_dec"]


@pytest.mark.parametrize("heaviside", [False, True])
def test_each_token_is_encoded_by_its_expert_as_the_paper_says(
    heaviside: bool, tmp_path: Path, stream: Tensor
) -> None:
    sae = open_sae(_make(tmp_path, heaviside=heaviside))
    assert (sae.architecture, sae.d_in, sae.d_sae, sae.hook) == (
        "switch",
        D_IN,
        D_SAE,
        Hook(3, "resid_post"),
    )
    ours = Resident.of(sae)
    encoded = ours.encode(stream)
    decoded = ours.decode(encoded.f, encoded)
    seen = set()
    for i, x in enumerate(stream):
        expert, gain, f, reconstruction = _plain(_tensors(tmp_path), x, heaviside)
        seen.add(expert)
        assert torch.equal(encoded.f[i] > 0, f > 0)
        torch.testing.assert_close(encoded.f[i], f, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(float(encoded.gain[i]), gain, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(decoded[i], reconstruction, atol=1e-5, rtol=1e-5)
    assert len(seen) > 2


def test_only_the_chosen_expert_is_weighed(tmp_path: Path) -> None:
    ours = Resident.of(open_sae(_make(tmp_path)))
    assert ours.flops_per_token == 2 * D_IN * (EXPERTS + SIZE)


def test_an_expert_smaller_than_k_keeps_all_its_features(tmp_path: Path, stream: Tensor) -> None:
    ours = Resident.of(open_sae(_make(tmp_path, k=SIZE + 9)))
    f = ours.encode(stream).f
    dense = torch.relu((stream - ours.b_dec) @ ours.encoder.linear.weight.T)
    expert = torch.nonzero(f.reshape(-1, EXPERTS, SIZE).any(dim=2))[:, 1]
    rows = torch.arange(len(stream))
    chosen = dense.reshape(-1, EXPERTS, SIZE)[rows, expert]
    torch.testing.assert_close(f.reshape(-1, EXPERTS, SIZE)[rows, expert], chosen, atol=1e-5, rtol=1e-5)


def test_rows_hold_the_decoder_and_the_sae_says_why_they_do_not_suffice(tmp_path: Path) -> None:
    sae = open_sae(_make(tmp_path))
    assert sae.refusal is None
    assert sae.needs_resident is not None
    assert not sae.per_feature
    torch.testing.assert_close(sae.rows([7, 70]).decoder, _tensors(tmp_path)["decoder"][[7, 70]])
    with pytest.raises(CheckpointError, match="router"):
        sae.encode(torch.zeros(1, D_IN))


def test_k_and_experts_are_read_from_a_config_without_a_trainer_too(tmp_path: Path) -> None:
    _make(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"k": K, "experts": EXPERTS}))
    sae = open_sae(tmp_path / "ae.pt")
    assert (sae.top_k, sae.hook) == (K, None)


@pytest.mark.parametrize(
    "change",
    [
        {"k": 0},
        {"k": D_SAE + 1},
        {"k": None},
        {"k": True},
        {"experts": 0},
        {"experts": 4},
        {"experts": 7},
        {"experts": "5"},
        {"dict_size": D_SAE + 1},
        {"activation_dim": D_IN - 1},
        {"heaviside": "no"},
        {"layer": -1},
        {"layer": "3"},
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    _make(tmp_path)
    _change_config(tmp_path, **change)
    with pytest.raises(CheckpointError, match="expected"):
        open_sae(tmp_path)


def test_a_config_that_is_missing_or_no_object_is_refused(tmp_path: Path) -> None:
    _make(tmp_path)
    (tmp_path / "config.json").write_text('{"trainer": [1]}')
    with pytest.raises(CheckpointError, match="trainer"):
        open_sae(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_sae(tmp_path)


def test_an_sae_of_another_site_is_not_served(tmp_path: Path) -> None:
    _make(tmp_path)
    _change_config(tmp_path, submodule_name="mlp_out_layer_3")
    assert "mlp_out" in (open_sae(tmp_path).refusal or "")


@pytest.mark.parametrize("name", ["encoder.weight", "router.weight", "b_dec", "b_router", "decoder"])
def test_a_tensor_that_is_missing_or_misshapen_or_not_finite_is_refused(name: str, tmp_path: Path) -> None:
    whole = _tensors(_make(tmp_path))
    spoilt = whole[name].clone()
    spoilt.view(-1)[3] = torch.nan
    fewer = {key: value for key, value in whole.items() if key != name}
    for tensors in (fewer, {**whole, name: whole[name][:-1].clone()}, {**whole, name: spoilt}):
        torch.save(tensors, tmp_path / "ae.pt")
        with pytest.raises(CheckpointError, match="expected"):
            open_sae(tmp_path)


def test_a_tensor_too_many_is_refused(tmp_path: Path) -> None:
    whole = _tensors(_make(tmp_path))
    torch.save({**whole, "encoder.bias": torch.zeros(D_SAE)}, tmp_path / "ae.pt")
    with pytest.raises(CheckpointError, match="no such tensor") as caught:
        open_sae(tmp_path)
    assert caught.value.tensor == "encoder.bias"


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(2)],
        {"router.weight": "text"},
        {"router.weight": torch.zeros(2, dtype=torch.int8)},
        {"router.weight": torch.zeros(1).expand(10**12)},
        {"router.weight": torch.zeros(2, 2).to_sparse()},
    ],
    ids=["list", "text", "integers", "a shape larger than the file", "sparse"],
)
def test_a_file_that_holds_anything_but_plain_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    _make(tmp_path)
    torch.save(content, tmp_path / "ae.pt")
    with pytest.raises(CheckpointError, match="expected"):
        open_sae(tmp_path)


def test_code_in_the_file_never_runs(tmp_path: Path) -> None:
    _make(tmp_path)
    fired = tmp_path / "fired"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (fired,)

    torch.save({"router.weight": Bomb()}, tmp_path / "ae.pt")
    with pytest.raises(CheckpointError, match="nothing else is unpickled"):
        open_sae(tmp_path)
    assert not fired.exists()


@pytest.mark.parametrize("keep", [0, 100, -200])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = _make(tmp_path) / "ae.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="whole file"):
        open_sae(tmp_path)


def test_a_file_that_unpacks_to_more_than_its_size_is_refused(tmp_path: Path) -> None:
    path = _make(tmp_path) / "ae.pt"
    with zipfile.ZipFile(path) as archive:
        members = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="uncompressed"):
        open_sae(tmp_path)


def test_another_librarys_file_of_the_same_name_is_not_taken_for_one(tmp_path: Path) -> None:
    whole = _tensors(_make(tmp_path))
    del whole["router.weight"]
    torch.save(whole, tmp_path / "ae.pt")
    with pytest.raises(CheckpointError, match="with a router"):
        open_sae(tmp_path)
