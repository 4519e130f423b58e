"""The experiment on image-shaped activations: rank-1 atoms against flat ones, where they win and lose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor

from steerserve.sae.architectures.tensor import TensorSae

from .fit import Recipe, fit
from .flat import FlatSae, parameter_count
from .images import bars, diagonals
from .planted import SparseSums
from .recovery import alive, best_matches, cosines, explained_variance, mmcs

__all__ = ["FEATURES", "IMAGES", "PLANTED", "SIZE", "ImageRun", "TensorResult", "run"]

SIZE, PLANTED, FEATURES = 12, 24, 32
# Training images of the main comparison, then of the two that ask how few are enough.
IMAGES = (4096, 512, 128)
_ACTIVE, _NOISE, _L1, _HELD_OUT = 3.0, 0.05, 0.1, 2048
_BATCH, _LR = 128, 3e-3

ImageSae = TensorSae | FlatSae


@dataclass(frozen=True)
class ImageRun:
    """One SAE on one data set.

    Attributes:
        data: what was planted. model: which SAE. images: how many it was trained on.
        latents, parameters: its size. explained_variance: of held-out images without their noise.
        l0: features active in one. alive: features that fire at all. mmcs: see `recovery.mmcs`.
        losses: of every step. matches: [K, 3, size, size], its atom most like each planted one. best: [K].
    """

    data: str
    model: str
    images: int
    latents: int
    parameters: int
    explained_variance: float
    l0: float
    alive: int
    mmcs: float
    losses: list[float]
    matches: Tensor
    best: Tensor


@dataclass(frozen=True)
class TensorResult:
    """What was planted, by data set, [K, 3, size, size], and what every SAE found of it."""

    planted: dict[str, Tensor]
    runs: list[ImageRun]

    def find(self, data: str, model: str, images: int = IMAGES[0]) -> ImageRun:
        """The run of this name."""
        return next(r for r in self.runs if (r.data, r.model, r.images) == (data, model, images))


def run(steps: int, seed: int, bar: Progress | None = None) -> TensorResult:
    """Train every SAE of the comparison. Args: steps: of each. seed: decides data, starts and batches."""
    draw = torch.Generator().manual_seed(seed)
    planted = {"bars": bars(PLANTED, SIZE, draw), "diagonals": diagonals(PLANTED, SIZE, draw)}
    runs = []
    for data, atoms in planted.items():
        source = SparseSums(atoms, _ACTIVE, _NOISE)
        train, (held_out, clean) = source.sample(IMAGES[0], draw)[0], source.sample(_HELD_OUT, draw)
        for images in IMAGES if data == "bars" else IMAGES[:1]:
            for model, make in _models(seed).items():
                sae = make()
                recipe = Recipe(steps, _BATCH, _LR, seed)
                losses = fit(sae, train[:images], recipe, name=f"{model}, {images} {data}", bar=bar)
                runs.append(_judge(data, model, images, sae, atoms, held_out, clean, losses))
    return TensorResult(planted, runs)


def _models(seed: int) -> dict[str, Callable[[], ImageSae]]:
    """The SAEs compared, each from the same seed."""
    shape = (3, SIZE, SIZE)

    def start() -> torch.Generator:
        return torch.Generator().manual_seed(seed + 1)

    budget = parameter_count(TensorSae(shape, FEATURES, l1=_L1))
    flat_latent = parameter_count(FlatSae(shape, 2, l1=_L1)) - parameter_count(FlatSae(shape, 1, l1=_L1))
    fewer = (budget - 3 * SIZE**2) // flat_latent
    return {
        "tensor": lambda: TensorSae(shape, FEATURES, l1=_L1, generator=start()),
        "flat, equal latents": lambda: FlatSae(shape, FEATURES, l1=_L1, generator=start()),
        "flat, equal parameters": lambda: FlatSae(shape, fewer, l1=_L1, generator=start()),
    }


@torch.no_grad()
def _judge(
    data: str,
    model: str,
    images: int,
    sae: ImageSae,
    planted: Tensor,
    held_out: Tensor,
    clean: Tensor,
    losses: list[float],
) -> ImageRun:
    z, atoms = sae.encode(held_out), sae.atoms()
    similarity = cosines(planted, atoms)
    return ImageRun(
        data=data,
        model=model,
        images=images,
        latents=sae.d_sae,
        parameters=parameter_count(sae),
        explained_variance=explained_variance(clean, sae.decode(z)),
        l0=float((z > 0).sum(1).double().mean()),
        alive=alive(z),
        mmcs=mmcs(similarity),
        losses=losses,
        matches=atoms[best_matches(similarity)],
        best=similarity.amax(1),
    )
