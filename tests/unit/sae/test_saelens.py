"""Our encode, decode and rows against SAELens' own, on folders that SAELens saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerserve.errors import CheckpointError
from steerserve.sae import Hook, open_sae

from .conftest import D_IN, D_SAE, Make, edit_config

PER_FEATURE = ["standard", "jumprelu", "gated", "batchtopk"]


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("kind", [*PER_FEATURE, "topk"])
def test_encode_and_decode_equal_saelens(
    kind: str, apply_b_dec: bool, make: Make, stream: torch.Tensor
) -> None:
    theirs, folder = make(kind, apply_b_dec_to_input=apply_b_dec)
    ours = open_sae(folder)
    f = theirs.encode(stream).detach()
    assert (f > 0).any()
    assert (f == 0).any()
    torch.testing.assert_close(ours.encode(stream), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(f), theirs.decode(f).detach(), atol=1e-5, rtol=1e-5)
    assert (ours.d_in, ours.d_sae, ours.hook) == (D_IN, D_SAE, Hook(3, "resid_post"))
    assert ours.architecture == kind


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("kind", PER_FEATURE)
def test_rows_are_the_named_columns_of_encode(
    kind: str, apply_b_dec: bool, make: Make, stream: torch.Tensor
) -> None:
    theirs, folder = make(kind, apply_b_dec_to_input=apply_b_dec)
    features = [61, 3, 3, 40]
    rows = open_sae(folder).rows(features)
    f = theirs.encode(stream).detach()
    torch.testing.assert_close(rows.activations(stream), f[:, features], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows.decoder, theirs.W_dec.detach()[features], atol=1e-6, rtol=1e-6)
    assert all(getattr(rows, name).dtype == torch.float32 for name in rows.__dataclass_fields__)
    assert all(getattr(rows, name).is_contiguous() for name in rows.__dataclass_fields__)


def test_an_edit_by_rows_equals_encode_edit_decode(make: Make, stream: torch.Tensor) -> None:
    theirs, folder = make("jumprelu")
    rows = open_sae(folder).rows([7])
    f = theirs.encode(stream).detach()
    edited = f.clone()
    edited[:, 7] = 4.0
    difference = (theirs.decode(edited) - theirs.decode(f)).detach()
    torch.testing.assert_close(
        (4.0 - rows.activations(stream)) @ rows.decoder, difference, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("rescale", [True, False])
def test_top_k_is_exact_when_whole_and_needs_the_whole(
    rescale: bool, make: Make, stream: torch.Tensor
) -> None:
    theirs, folder = make("topk", rescale_acts_by_decoder_norm=rescale)
    ours = open_sae(folder)
    f = theirs.encode(stream).detach()
    torch.testing.assert_close(ours.encode(stream), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(f), theirs.decode(f).detach(), atol=1e-5, rtol=1e-5)
    assert (ours.refusal, ours.per_feature, ours.top_k) == (None, False, 5)
    assert "top-k" in (ours.needs_resident or "")
    norm = theirs.W_dec.norm(dim=-1, keepdim=True).detach() if rescale else 1.0
    torch.testing.assert_close(ours.rows([4]).decoder, (theirs.W_dec.detach() / norm)[[4]])


@pytest.mark.parametrize("kind", PER_FEATURE)
def test_an_expected_average_scale_beside_the_weights_folds(
    kind: str, make: Make, stream: torch.Tensor
) -> None:
    theirs, folder = make(kind)
    edit_config(folder, normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.3}))
    theirs.fold_activation_norm_scaling_factor(0.3)
    ours = open_sae(folder)
    f = theirs.encode(stream).detach()
    torch.testing.assert_close(ours.encode(stream), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(f), theirs.decode(f).detach(), atol=5e-5, rtol=1e-5)


def test_an_expected_average_without_its_scale_is_refused(make: Make) -> None:
    _, folder = make("standard")
    edit_config(folder, normalize_activations="expected_average_only_in")
    sae = open_sae(folder)
    assert not sae.per_feature
    with pytest.raises(CheckpointError, match="scaling factor"):
        sae.rows([0])


def test_covariance_whitening_is_refused(make: Make, stream: torch.Tensor) -> None:
    _, folder = make("standard")
    edit_config(folder, normalize_activations="covariance_whitening")
    sae = open_sae(folder)
    for use in (lambda: sae.rows([0]), lambda: sae.encode(stream)):
        with pytest.raises(CheckpointError, match=r"covariance_whitening.*not served"):
            use()


@pytest.mark.parametrize("kind", ["standard", "topk"])
@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale"])
def test_a_normalisation_of_each_token_needs_the_whole(
    how: str, kind: str, make: Make, stream: torch.Tensor
) -> None:
    theirs, folder = make(kind, normalize_activations=how)
    sae = open_sae(folder)
    assert (sae.refusal, sae.per_feature, sae.normalisation) == (None, False, how)
    assert how in (sae.needs_resident or "")
    # Rows are in normalised scale: the token's gain multiplies them.
    torch.testing.assert_close(sae.rows([4]).decoder, theirs.W_dec.detach()[[4]])
    for use in (lambda: sae.encode(stream), lambda: sae.decode(torch.zeros(1, D_SAE))):
        with pytest.raises(CheckpointError, match=how):
            use()


def test_a_top_k_sae_of_another_site_is_refused(make: Make) -> None:
    _, folder = make("topk")
    edit_config(folder, metadata={"hook_name": "blocks.3.hook_mlp_out", "sae_lens_version": "6.0.0"})
    assert "hook_mlp_out" in (open_sae(folder).refusal or "")


def test_an_sae_on_attention_heads_is_refused(make: Make) -> None:
    _, folder = make("standard")
    edit_config(folder, reshape_activations="hook_z")
    with pytest.raises(CheckpointError, match="attention heads"):
        open_sae(folder).rows([0])


def test_an_sae_on_another_site_is_refused(make: Make) -> None:
    _, folder = make("standard")
    edit_config(folder, metadata={"hook_name": "blocks.3.hook_mlp_out", "sae_lens_version": "6.0.0"})
    with pytest.raises(CheckpointError, match="hook_mlp_out"):
        open_sae(folder).rows([0])


def test_a_folder_of_saelens_before_version_6_is_read(make: Make, stream: torch.Tensor) -> None:
    theirs, folder = make("standard")
    old = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "hook_point": "blocks.{layer}.hook_resid_pre",
        "hook_point_layer": 5,
        "activation_fn_str": "relu",
        "normalize_activations": False,
    }
    (folder / "cfg.json").write_text(json.dumps(old))
    ours = open_sae(folder / "sae_weights.safetensors")
    assert ours.hook == Hook(5, "resid_pre")
    torch.testing.assert_close(ours.encode(stream), theirs.encode(stream).detach(), atol=1e-5, rtol=1e-5)


def test_top_k_of_saelens_before_version_6_is_recognised(make: Make, stream: torch.Tensor) -> None:
    theirs, folder = make("topk")
    old = {"d_in": D_IN, "d_sae": D_SAE, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    (folder / "cfg.json").write_text(json.dumps(old))
    ours = open_sae(folder)
    assert ours.architecture == "topk"
    torch.testing.assert_close(ours.encode(stream), theirs.encode(stream).detach(), atol=1e-5, rtol=1e-5)


def test_an_activation_function_saelens_would_ignore_is_refused(make: Make) -> None:
    _, folder = make("standard")
    (folder / "cfg.json").write_text(
        json.dumps({"d_in": D_IN, "d_sae": D_SAE, "activation_fn_str": "tanh-relu"})
    )
    with pytest.raises(CheckpointError, match="tanh-relu"):
        open_sae(folder)


def _with_factor(folder: Path, factor: torch.Tensor, flag: bool) -> None:
    path = folder / "sae_weights.safetensors"
    save_file({**load_file(path), "scaling_factor": factor}, path)
    edit_config(folder, finetuning_scaling_factor=flag)


def test_a_finetuning_factor_scales_the_decoder(make: Make, stream: torch.Tensor) -> None:
    theirs, folder = make("standard")
    factor = torch.linspace(0.5, 2.0, D_SAE)
    _with_factor(folder, factor, True)
    ours, f = open_sae(folder), theirs.encode(stream).detach()
    torch.testing.assert_close(ours.encode(stream), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(f), theirs.decode(f * factor).detach(), atol=1e-5, rtol=1e-5)


def test_a_finetuning_factor_of_ones_changes_nothing(make: Make, stream: torch.Tensor) -> None:
    theirs, folder = make("standard")
    _with_factor(folder, torch.ones(D_SAE), False)
    f = theirs.encode(stream).detach()
    torch.testing.assert_close(open_sae(folder).decode(f), theirs.decode(f).detach(), atol=1e-5, rtol=1e-5)


def test_a_finetuning_factor_that_the_config_denies_is_refused(make: Make) -> None:
    _, folder = make("standard")
    _with_factor(folder, torch.full((D_SAE,), 2.0), False)
    with pytest.raises(CheckpointError, match="finetuning_scaling_factor"):
        open_sae(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_served_in_float32(
    dtype: torch.dtype, make: Make, stream: torch.Tensor
) -> None:
    theirs, folder = make("jumprelu")
    path = folder / "sae_weights.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    rounded = theirs.to(dtype=dtype).to(dtype=torch.float32)
    rows = open_sae(folder).rows(range(D_SAE))
    torch.testing.assert_close(
        rows.activations(stream), rounded.encode(stream).detach(), atol=1e-5, rtol=1e-5
    )


def test_using_an_sae_does_not_change_its_weights(make: Make, stream: torch.Tensor) -> None:
    _, folder = make("standard")
    path = folder / "sae_weights.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path)
    _with_factor(folder, torch.full((D_SAE,), 2.0), True)
    sae = open_sae(folder)
    f = sae.encode(stream)
    assert torch.equal(sae.decode(f), sae.decode(f))


def test_reading_rows_copies_no_whole_matrix(tmp_path: Path) -> None:
    d, features = 64, 200_000
    tensors = {
        "W_enc": torch.zeros(d, features),
        "W_dec": torch.zeros(features, d),
        "b_enc": torch.zeros(features),
        "b_dec": torch.zeros(d),
    }
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    config = {"d_in": d, "d_sae": features, "architecture": "standard"}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    whole = tensors["W_enc"].nbytes
    del tensors
    before = _anonymous_bytes()
    sae = open_sae(tmp_path)
    rows = sae.rows([0, 199_999, 5])
    assert len(rows) == 3
    assert _anonymous_bytes() - before < whole / 2


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
