"""A small catalog of random SAEs and a direction, for tests that need no engine."""

from __future__ import annotations

from pathlib import Path

import torch

from steerserve.catalog import Catalog, build_catalog
from steerserve.config import DirectionConfig, SaeConfig, SteerserveConfig
from steerserve.sae import Direction, Hook, write_direction
from tests.support.models import D_MODEL, N_LAYERS
from tests.support.saes import make_sae


def make_catalog(folder: Path, max_interventions: int = 16) -> Catalog:
    """SAEs `jump` and `gate` at resid_post.2, `std` at resid_post.1, direction `north` at resid_post.2."""
    statistics = {"max_activation": 12.0}
    unit = torch.nn.functional.normalize(torch.ones(D_MODEL), dim=0)
    write_direction(folder / "north.safetensors", Direction("north", unit, Hook(2, "resid_post"), statistics))
    places = {"jump": ("jumprelu", 2), "gate": ("gated", 2), "std": ("standard", 1)}
    config = SteerserveConfig(
        saes=[
            SaeConfig(name=name, path=make_sae(folder / name, kind, layer, seed=layer))
            for name, (kind, layer) in places.items()
        ],
        directions=[DirectionConfig(name="north", path=folder / "north.safetensors")],
        max_interventions=max_interventions,
    )
    return build_catalog(config, n_layers=N_LAYERS, d_model=D_MODEL, special_tokens=[0, 1, 2])
