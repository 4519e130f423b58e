"""A resident SAE's encode and decode against SAELens' own, on folders that SAELens saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae import open_sae
from steerserve.sae.resident import Resident
from tests.support.saes import load_sae, make_sae

D_IN, D_SAE = 64, 4096
K = 50
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": K},
    "topk, rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "topk, layer_norm": {"k": K, "normalize_activations": "layer_norm"},
    "topk, constant_norm_rescale": {"k": K, "normalize_activations": "constant_norm_rescale"},
    "standard": {},
    "standard, layer_norm": {"normalize_activations": "layer_norm"},
    "standard, constant_norm_rescale": {"normalize_activations": "constant_norm_rescale"},
    "jumprelu": {},
    "jumprelu, layer_norm": {"normalize_activations": "layer_norm"},
    "gated": {},
    "gated, layer_norm": {"normalize_activations": "layer_norm"},
    "batchtopk": {},
}


@pytest.fixture(scope="module")
def stream() -> Tensor:
    """Tokens of very different sizes around a common mean, as residual streams are."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(200, 1, generator=generator) * 4 + 0.1
    return torch.randn(200, D_IN, generator=generator) * scale + torch.randn(D_IN, generator=generator)


def _close(got: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest number: sums of thousands of features round to that."""
    atol = 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


def _pair(folder: Path, kind: str, seed: int) -> tuple[Any, Resident]:
    make_sae(folder, kind.split(",")[0], 2, seed=seed, d_in=D_IN, d_sae=D_SAE, **KINDS[kind])
    return load_sae(folder), Resident.of(open_sae(folder))


@pytest.mark.parametrize("seed", [0, 1], ids=["b_dec subtracted", "b_dec not subtracted"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_and_reconstruction_equal_saelens(
    kind: str, seed: int, tmp_path: Path, stream: Tensor
) -> None:
    theirs, ours = _pair(tmp_path, kind, seed)
    with torch.no_grad():
        f = theirs.encode(stream)
        decoded = theirs.decode(f)
    encoded = ours.encode(stream)
    assert torch.equal(encoded.f > 0, f > 0)
    torch.testing.assert_close(encoded.f, f, atol=1e-5, rtol=1e-5)
    _close(ours.decode(encoded.f, encoded), decoded)
    assert encoded.f.dtype == encoded.gain.dtype == encoded.offset.dtype == torch.float32
    if kind.startswith("topk"):
        assert int((encoded.f > 0).sum(dim=1).max()) == K


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_times_gain_and_decoder_row_is_what_saelens_decodes_differently(
    kind: str, tmp_path: Path, stream: Tensor
) -> None:
    theirs, ours = _pair(tmp_path, kind, 0)
    encoded = ours.encode(stream)
    edited = encoded.f.clone()
    edited[:, 7] = 4.0
    row = open_sae(tmp_path).rows([7]).decoder[0]
    with torch.no_grad():
        theirs.encode(stream)
        before = theirs.decode(encoded.f)
        theirs.encode(stream)
        difference = theirs.decode(edited) - before
    change = encoded.gain * (4.0 - encoded.f[:, 7])
    torch.testing.assert_close(
        change.unsqueeze(1) * row, difference, atol=1e-5 * float(before.abs().max()), rtol=0
    )
    assert torch.equal(ours.decoder[7], row)


@pytest.mark.parametrize("kind", ["topk", "topk, rescaled", "standard"])
def test_an_expected_average_scale_is_folded(kind: str, tmp_path: Path, stream: Tensor) -> None:
    settings = {**KINDS[kind], "normalize_activations": "expected_average_only_in"}
    make_sae(tmp_path, kind.split(",")[0], 2, d_in=D_IN, d_sae=D_SAE, **settings)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.3}')
    theirs, ours = load_sae(tmp_path), Resident.of(open_sae(tmp_path))
    with torch.no_grad():
        if "rescaled" in kind:
            # SAELens scales the decoder in place, and with it the norms it selects by.
            theirs.fold_W_dec_norm()
            theirs.cfg.rescale_acts_by_decoder_norm = False
        theirs.fold_activation_norm_scaling_factor(0.3)
        f = theirs.encode(stream)
        decoded = theirs.decode(f)
    encoded = ours.encode(stream)
    torch.testing.assert_close(encoded.f, f, atol=1e-5, rtol=1e-5)
    _close(ours.decode(encoded.f, encoded), decoded)


def test_equal_pre_activations_are_chosen_between_as_saelens_chooses(tmp_path: Path, stream: Tensor) -> None:
    make_sae(tmp_path, "topk", 2, d_in=D_IN, d_sae=256, k=6)
    path = tmp_path / "sae_weights.safetensors"
    tensors = load_file(path)
    for name in ("W_enc", "b_enc"):
        # Every feature four times over: an edge of six always falls between equals.
        tensors[name] = tensors[name][..., :64].repeat(*([1] * (tensors[name].ndim - 1)), 4).contiguous()
    save_file(tensors, path)
    theirs = load_sae(tmp_path).encode(stream).detach()
    assert torch.equal(Resident.of(open_sae(tmp_path)).encode(stream).f > 0, theirs > 0)


def test_negative_pre_activations_among_the_top_k_are_rectified(tmp_path: Path) -> None:
    make_sae(tmp_path, "topk", 2, d_in=D_IN, d_sae=64, k=60)
    x = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(3))
    f = Resident.of(open_sae(tmp_path)).encode(x).f
    torch.testing.assert_close(f, load_sae(tmp_path).encode(x).detach(), atol=1e-5, rtol=1e-5)
    assert (f >= 0).all()
    assert int((f > 0).sum(dim=1).max()) < 60


def test_the_strongest_features_come_in_order(tmp_path: Path, stream: Tensor) -> None:
    theirs, ours = _pair(tmp_path, "topk", 0)
    indices, values = ours.strongest(stream, 10)
    expected = theirs.encode(stream).detach().topk(10, dim=-1)
    torch.testing.assert_close(values, expected.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(indices, expected.indices)
    assert (values[:, 1:] <= values[:, :-1]).all()
    nobody = ours.strongest(stream[:0], 10)
    assert [part.shape for part in nobody] == [(0, 10), (0, 10)]


@pytest.mark.parametrize("kind", ["topk", "topk, layer_norm", "standard", "jumprelu"])
def test_a_token_that_is_not_finite_spoils_only_itself(kind: str, tmp_path: Path, stream: Tensor) -> None:
    _, ours = _pair(tmp_path, kind, 0)
    spoilt = stream[:8].clone()
    spoilt[3, 5] = torch.nan
    f = ours.encode(spoilt).f
    assert torch.equal(f.isfinite().all(dim=1), torch.arange(8) != 3)
    torch.testing.assert_close(f[:3], ours.encode(stream[:8]).f[:3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["standard, layer_norm", "standard, constant_norm_rescale"])
def test_small_tokens_are_normalised_as_saelens_normalises_them(
    kind: str, tmp_path: Path, stream: Tensor
) -> None:
    theirs, ours = _pair(tmp_path, kind, 0)
    x = stream * 1e-4
    f = theirs.encode(x).detach()
    encoded = ours.encode(x)
    torch.testing.assert_close(encoded.f, f, atol=1e-5, rtol=1e-5)
    decoded = theirs.decode(f).detach()
    torch.testing.assert_close(
        ours.decode(f, encoded), decoded, atol=1e-5 * float(decoded.abs().max()), rtol=0
    )


def test_the_zero_vector_has_no_constant_norm(tmp_path: Path) -> None:
    _, ours = _pair(tmp_path, "standard, constant_norm_rescale", 0)
    assert ours.encode(torch.zeros(1, D_IN)).f.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_and_streams_of_another_precision_are_encoded_in_float32(
    dtype: torch.dtype, tmp_path: Path, stream: Tensor
) -> None:
    make_sae(tmp_path, "topk", 2, d_in=D_IN, d_sae=D_SAE, k=K)
    path = tmp_path / "sae_weights.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    ours = Resident.of(open_sae(tmp_path))
    rounded = load_sae(tmp_path).to(dtype=torch.float32)
    x = stream.to(torch.bfloat16)
    f = rounded.encode(x.float()).detach()
    assert torch.equal(ours.encode(x).f > 0, f > 0)
    torch.testing.assert_close(ours.encode(x).f, f, atol=1e-5, rtol=1e-5)


def test_what_it_costs_is_known(tmp_path: Path) -> None:
    _, ours = _pair(tmp_path, "topk", 0)
    matrices = 2 * D_SAE * D_IN * 4
    assert matrices < ours.nbytes < matrices * 1.1
    assert ours.flops_per_token == 2 * D_SAE * D_IN


def test_an_sae_copied_in_small_pieces_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: Tensor
) -> None:
    monkeypatch.setattr("steerserve.sae.encoders.base._COPIED_AT_ONCE", 5 * D_SAE)
    theirs, ours = _pair(tmp_path, "topk, rescaled", 0)
    assert not ours.encoder.weight.is_contiguous()
    encoded = ours.encode(stream)
    f = theirs.encode(stream).detach()
    torch.testing.assert_close(encoded.f, f, atol=1e-5, rtol=1e-5)
    decoded = theirs.decode(f).detach()
    _close(ours.decode(encoded.f, encoded), decoded)


def test_an_sae_that_is_refused_cannot_be_resident(tmp_path: Path) -> None:
    make_sae(tmp_path, "standard", 2, normalize_activations="expected_average_only_in")
    with pytest.raises(CheckpointError, match="scaling factor"):
        Resident.of(open_sae(tmp_path))


def test_a_weight_that_is_not_finite_is_found_in_a_file_that_was_not_scanned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerserve.sae.formats.common.OPENED_WHOLE", 0)
    path = make_sae(tmp_path, "jumprelu", 2) / "sae_weights.safetensors"
    whole = load_file(path)
    for name, ours in {"W_enc": "encoder", "W_dec": "decoder", "threshold": "threshold"}.items():
        spoilt = whole[name].clone()
        spoilt.view(-1)[3] = torch.inf
        save_file({**whole, name: spoilt}, path)
        with pytest.raises(CheckpointError, match="finite") as caught:
            Resident.of(open_sae(tmp_path))
        assert caught.value.tensor == ours


def test_weights_that_overflow_when_folded_are_refused(tmp_path: Path) -> None:
    make_sae(tmp_path, "standard", 2, normalize_activations="expected_average_only_in")
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 1e-44}')
    with pytest.raises(CheckpointError, match="finite") as caught:
        Resident.of(open_sae(tmp_path))
    assert caught.value.tensor == "decoder"
