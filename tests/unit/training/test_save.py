from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from steerserve.errors import CheckpointError
from steerserve.sae import Hook, open_sae
from steerserve.sae.resident import Resident
from steerserve.training.save import save_inference_sae, save_trained
from steerserve.training.trainer import train as run

from .conftest import Harvest
from .test_trainer import of, planted, settings

SAVED_AS = {"batchtopk": "jumprelu", "matryoshka": "jumprelu"}


@pytest.mark.parametrize("name", ["batchtopk", "gated", "jumprelu", "matryoshka", "standard", "topk"])
def test_saelens_loads_what_is_saved_with_the_same_activations(
    name: str, harvest: Harvest, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE

    x = planted(5000)[0]
    reader, wanted = harvest(x), of(name, tokens=20_000)
    trained = run(reader, wanted)
    save_inference_sae(tmp_path / "sae", trained, wanted, reader.header)
    theirs, ours = SAE.load_from_disk(tmp_path / "sae"), open_sae(tmp_path / "sae")
    f = theirs.encode(x).detach()
    assert (f > 0).any()
    scale = float(f.max())
    torch.testing.assert_close(ours.encode(x) / scale, f / scale, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.decode(f), theirs.decode(f).detach(), atol=1e-5, rtol=1e-5)
    assert theirs.cfg.architecture() == SAVED_AS.get(name, name)
    assert theirs.cfg.metadata.training_architecture == trained.sae.exported_as
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    # Folding keeps the trained function: activations are those of the normalised input, over the scale.
    own = trained.sae.encode(x * trained.scale) / trained.scale
    torch.testing.assert_close(f, own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["kron", "switch", "vaease"])
def test_what_saelens_does_not_know_is_served_with_the_trained_activations(
    name: str, harvest: Harvest, tmp_path: Path
) -> None:
    x = planted(5000)[0]
    reader, wanted = harvest(x), of(name, tokens=100_000)
    trained = run(reader, wanted)
    found = save_trained(tmp_path / "sae", trained, wanted, reader.header, x.split(900))
    sae = open_sae(tmp_path / "sae")
    assert (sae.architecture, sae.hook, sae.refusal) == (name, Hook(3, "resid_post"), None)
    ours = Resident.of(sae)
    f, reconstruction = ours.autoencode(x)
    own, own_reconstruction = trained.sae.autoencode(x * trained.scale)
    assert (f != 0).any()
    size = float(own.abs().max())
    # An entry at the edge of a top k, or at a gate, may fall to either side.
    off = (f * trained.scale - own).abs() > 1e-5 * size
    assert float(off.sum()) <= 1e-4 * float((own != 0).sum())
    sound = ~off.any(dim=1)
    torch.testing.assert_close(
        reconstruction[sound] * trained.scale, own_reconstruction[sound], atol=1e-4, rtol=1e-4
    )
    assert found.l0 == pytest.approx(float((f != 0).sum()) / len(f), rel=1e-3)
    spread = (x - x.mean(0)).square().sum()
    assert found.explained_variance == pytest.approx(
        float(1 - (x - reconstruction).square().sum() / spread), abs=1e-3
    )


def test_weights_that_are_not_finite_are_never_saved(harvest: Harvest, tmp_path: Path) -> None:
    reader, wanted = harvest(planted(5000)[0]), settings(tokens=1000)
    trained = run(reader, wanted)
    trained.sae.parameters["bias"][3] = torch.nan
    with pytest.raises(CheckpointError, match="finite"):
        save_inference_sae(tmp_path / "sae", trained, wanted, reader.header)
