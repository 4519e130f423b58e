"""A zoo beside the demo's SAE: other architectures at its layer, and a BatchTopK SAE at every other layer.

They are there to be opened, served and compared; nobody tuned them. Two runs, one for each stream.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from steerserve.training.command import train_folders
from steerserve.training.config import TrainConfig
from steerserve.training.settings import TrainSettings, parse_settings

__all__ = ["LAYER", "LAYERS", "build_zoo", "settings_of"]

# Where the demo's SAE reads the stream, and the other layers.
LAYER = 4
LAYERS = (0, 1, 2, 3, 5)
_COMMON: dict[str, Any] = {
    "d_sae": 512,
    "tokens": 2_000_000,
    "batch_size": 2048,
    "lr": 2e-3,
    "held_out": 65_536,
    "sparsity_warm_up": 200,
}
_OWN: dict[str, dict[str, Any]] = {
    "gated": {"l1": 0.15, "lr": 1e-3},
    "jumprelu": {"l0_target": 16.0, "sparsity": 0.005, "lr": 1e-3},
    "kron": {"k": 16, "heads": 8, "base": 8, "extension": 8},
    "matryoshka": {"k": 16, "widths": [32, 64, 128, 256]},
    "switch": {"k": 16, "experts": 8},
    "topk": {"k": 16},
}


def settings_of(name: str, seed: int = 0) -> TrainSettings:
    """How one of the zoo is trained."""
    own = _OWN.get(name, {"k": 16})
    return parse_settings({**_COMMON, "architecture": name, "seed": seed, **own})


def build_zoo(folders: dict[int, Path], layer: int, out: Path, work: Path, seed: int) -> None:
    """Train the zoo into `out`, which is replaced.

    Args: folders: a harvest for each layer. layer: of the demo's SAE. work: for what is not finished.
    """
    shutil.rmtree(work, ignore_errors=True)
    console = Console()
    streams = {layer: list(_OWN)} | {other: ["batchtopk"] for other in LAYERS}
    for number, names in streams.items():
        places = {
            work / (name if number == layer else f"{name}-{number}"): settings_of(name, seed)
            for name in names
        }
        for place, found in zip(places, train_folders(TrainConfig(folders[number], places)), strict=True):
            console.print(
                f"{place.name}: explained variance {found.explained_variance:.3f}, L0 {found.l0:.1f}"
            )
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    work.rename(out)
