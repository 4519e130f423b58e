from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steerserve.errors import CheckpointError
from steerserve.sae import Hook, open_sae

D_IN, D_SAE = 12, 40


def _params() -> dict[str, Any]:
    random = np.random.default_rng(0)
    shapes: dict[str, Any] = {
        "W_enc": (D_IN, D_SAE),
        "W_dec": (D_SAE, D_IN),
        "b_enc": D_SAE,
        "b_dec": D_IN,
        "threshold": D_SAE,
    }
    params = {name: random.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    params["threshold"] = np.abs(params["threshold"])
    return params


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    path.mkdir(parents=True)
    np.savez(path / "params.npz", **_params())
    return path


def test_params_are_read_by_the_published_formula(folder: Path) -> None:
    p = {name: torch.from_numpy(value) for name, value in _params().items()}
    x = torch.randn(30, D_IN, generator=torch.Generator().manual_seed(0))
    pre = x @ p["W_enc"] + p["b_enc"]
    f = (pre > p["threshold"]) * torch.relu(pre)
    sae = open_sae(folder)
    assert (sae.hook, sae.architecture, sae.d_sae) == (Hook(12, "resid_post"), "jumprelu", D_SAE)
    torch.testing.assert_close(sae.encode(x), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.rows([5, 1]).activations(x), f[:, [5, 1]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(f), f @ p["W_dec"] + p["b_dec"], atol=1e-5, rtol=1e-5)
    assert open_sae(folder / "params.npz").d_in == D_IN


def test_arrays_in_fortran_order_are_read(folder: Path) -> None:
    params = _params()
    before = open_sae(folder).rows([3])
    turned: dict[str, Any] = {name: np.asfortranarray(value) for name, value in params.items()}
    np.savez(folder / "params.npz", **turned)
    assert torch.equal(open_sae(folder).rows([3]).encoder, before.encoder)


@pytest.mark.parametrize("part", ["gemma-scope-2b-pt-mlp", "gemma-scope-2b-pt-att", "embedding"])
def test_an_sae_off_the_residual_stream_is_refused(part: str, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / part / "layer_12"
    other.mkdir(parents=True)
    (folder / "params.npz").rename(other / "params.npz")
    with pytest.raises(CheckpointError, match=part):
        open_sae(other).rows([0])


def test_a_compressed_archive_is_refused_with_the_remedy(folder: Path) -> None:
    np.savez_compressed(folder / "params.npz", **_params())
    with pytest.raises(CheckpointError, match=r"numpy\.savez"):
        open_sae(folder)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_archive_is_refused(share: float, folder: Path) -> None:
    data = (folder / "params.npz").read_bytes()
    (folder / "params.npz").write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match="whole npz archive"):
        open_sae(folder)


def test_a_missing_threshold_is_refused(folder: Path) -> None:
    params = _params()
    del params["threshold"]
    np.savez(folder / "params.npz", **params)
    with pytest.raises(CheckpointError) as caught:
        open_sae(folder)
    assert caught.value.tensor == "threshold"


def test_a_nan_in_an_archive_is_refused(folder: Path) -> None:
    params = _params()
    params["W_dec"][3, 3] = np.nan
    np.savez(folder / "params.npz", **params)
    with pytest.raises(CheckpointError, match="finite"):
        open_sae(folder)
