from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch

from steerserve.errors import CheckpointError
from steerserve.sae import open_sae
from steerserve.training.save import save_inference_sae
from steerserve.training.trainer import train as run

from .conftest import Harvest
from .test_trainer import planted, settings


def test_saelens_loads_what_is_saved_with_the_same_activations(harvest: Harvest, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE

    x = planted(5000)[0]
    reader, wanted = harvest(x), settings(tokens=20_000)
    trained = run(reader, wanted)
    save_inference_sae(tmp_path / "sae", trained, wanted, reader.header)
    theirs, ours = SAE.load_from_disk(tmp_path / "sae"), open_sae(tmp_path / "sae")
    f = theirs.encode(x).detach()
    assert (f > 0).any()
    torch.testing.assert_close(ours.encode(x), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(f), theirs.decode(f).detach(), atol=1e-5, rtol=1e-5)
    assert theirs.cfg.architecture() == "jumprelu"
    assert theirs.cfg.metadata.training_architecture == "batchtopk"
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    # Folding keeps the trained function: activations are those of the normalised input, over the scale.
    p = trained.parameters
    pre = (x * trained.scale - p.b_dec) @ p.encoder.T + p.bias
    torch.testing.assert_close(f, (pre * (pre > trained.threshold)) / trained.scale, atol=1e-4, rtol=1e-4)


def test_weights_that_are_not_finite_are_never_saved(harvest: Harvest, tmp_path: Path) -> None:
    reader, wanted = harvest(planted(5000)[0]), settings(tokens=1000)
    trained = dataclasses.replace(run(reader, wanted), threshold=float("nan"))
    with pytest.raises(CheckpointError, match="finite"):
        save_inference_sae(tmp_path / "sae", trained, wanted, reader.header)
