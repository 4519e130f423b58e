"""The zoo in `sae_weights/demo/zoo` is what its folders' names say, and whole."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from demo.zoo import LAYER, LAYERS
from steerserve.sae import Hook, verify_sae
from steerserve.sae.resident import Resident

ZOO = Path("sae_weights/demo/zoo")
BESIDE_THE_DEMO = ("gated", "jumprelu", "kron", "matryoshka", "switch", "topk")
EVERYWHERE = {f"batchtopk-{layer}": Hook(layer, "resid_post") for layer in LAYERS}
HOOKS = {**dict.fromkeys(BESIDE_THE_DEMO, Hook(LAYER, "resid_post")), **EVERYWHERE}


def test_every_kind_and_every_layer_is_there() -> None:
    assert {path.name for path in ZOO.iterdir()} == set(HOOKS)


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_a_zoo_sae_is_sound_and_reconstructs_as_its_manifest_says(name: str) -> None:
    sae = verify_sae(ZOO / name)
    assert sae.refusal is None
    assert sae.hook == HOOKS[name]
    architecture = name.partition("-")[0]
    expected = "matryoshka_batchtopk" if architecture == "matryoshka" else architecture
    assert sae.architecture == expected
    assert sae.manifest is not None
    assert sae.manifest.training["explained_variance"] > 0.75
    assert sae.manifest.training["dead_fraction"] < 0.3
    x = torch.randn(8, sae.d_in, generator=torch.Generator().manual_seed(0))
    f, x_hat = Resident.of(sae).autoencode(x)
    assert f.shape == (8, sae.d_sae)
    assert torch.isfinite(x_hat).all()


@pytest.mark.parametrize("name", sorted(set(HOOKS) - {"kron", "switch"}))
def test_saelens_opens_what_its_layout_holds(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE

        theirs = SAE.load_from_disk(ZOO / name)
    x = torch.randn(64, theirs.cfg.d_in, generator=torch.Generator().manual_seed(0))
    ours = Resident.of(verify_sae(ZOO / name)).autoencode(x)[0]
    f = theirs.encode(x).detach()
    torch.testing.assert_close(ours / f.max(), f / f.max(), atol=1e-6, rtol=1e-5)
