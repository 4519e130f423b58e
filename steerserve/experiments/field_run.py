"""One SAE judged on functions over a grid: the same measures for a functional and a flat one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt

import torch
from torch import Tensor

from steerserve.sae.architectures.functional import FunctionalSae, from_modes, to_modes

from .flat import FlatSae, parameter_count
from .recovery import alive, explained_variance, mmcs, mmcs_everywhere, shifted_cosines
from .taps import reconstruct_by_taps

__all__ = ["FieldData", "FieldRun", "flat_input", "grid_name", "judge", "judge_taps", "resampled"]

_FINER = 4


@dataclass(frozen=True)
class FieldData:
    """Functions to train and to judge on.

    Attributes:
        name: of the data set. grid: of training.
        train: [n, C, *grid]. held_out: by grid, the training grid first, the same functions [m, C, *that].
        planted: kernels [K, C, *grid] that appear at any place; None where there are none.
    """

    name: str
    grid: tuple[int, ...]
    train: Tensor
    held_out: dict[tuple[int, ...], Tensor]
    planted: Tensor | None


@dataclass(frozen=True)
class FieldRun:
    """One SAE on one data set.

    Attributes:
        data, model: names. latents: numbers that encode() gives for one function on the training grid.
        parameters: its size. explained_variance: of held-out functions, by grid, "64" or "24×24".
        l0: how many of the latents are not 0, mean over functions. alive: features that fire at all.
        mmcs: best cosine over features and shifts, mean over planted kernels; None where none was planted.
        everywhere: best cosine over features at a given shift, mean over kernels and shifts; likewise.
        losses: of every step.
    """

    data: str
    model: str
    latents: int
    parameters: int
    explained_variance: dict[str, float]
    l0: float
    alive: int
    mmcs: float | None
    everywhere: float | None
    losses: list[float]


def grid_name(grid: Sequence[int]) -> str:
    """(24, 24) → "24×24"."""
    return "×".join(map(str, grid))


def flat_input(x: Tensor) -> Tensor:
    """Functions scaled so that the squares of their values sum to ‖x‖²_{L²}.

    A flat SAE then has the functional one's loss, but for the concept price: an atom is a kernel at a place.
    """
    points: int = prod(x.shape[2:])
    return x / sqrt(points)


def resampled(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Functions on another grid by their Fourier series, exact where both grids resolve them."""
    modes = [(min(old, new) - 1) // 2 for old, new in zip(x.shape[2:], grid, strict=True)]
    return from_modes(to_modes(x, modes), modes, grid)


@torch.no_grad()
def judge(
    model: str, sae: FunctionalSae | FlatSae, data: FieldData, losses: list[float] | None = None
) -> FieldRun:
    """Measure an SAE. A flat one meets other grids by resampling to its own and back."""
    own = data.held_out[data.grid]
    z = sae.encode(own if isinstance(sae, FunctionalSae) else flat_input(own))
    found, everywhere = _recovered(sae, data) if data.planted is not None else (None, None)
    return FieldRun(
        data=data.name,
        model=model,
        latents=z[0].numel(),
        parameters=parameter_count(sae),
        explained_variance=_explained(data, lambda x: _reconstruct(sae, x, data.grid)),
        l0=float((z > 0).flatten(1).sum(1).double().mean()),
        alive=alive(z),
        mmcs=found,
        everywhere=everywhere,
        losses=losses or [],
    )


def judge_taps(model: str, sae: FunctionalSae, data: FieldData) -> FieldRun:
    """Measure the convolutional SAE that `sae` is on its training grid, carried to the others tap by tap."""
    run = judge(model, sae, data)
    taps = 2 * sae.d_sae * sae.channels * prod(data.grid) + sae.d_sae + sae.channels
    explained = _explained(data, lambda x: reconstruct_by_taps(sae, x, data.grid))
    return replace(run, parameters=taps, explained_variance=explained)


def _explained(data: FieldData, reconstruct: Callable[[Tensor], Tensor]) -> dict[str, float]:
    return {grid_name(g): explained_variance(x, reconstruct(x)) for g, x in data.held_out.items()}


def _reconstruct(sae: FunctionalSae | FlatSae, x: Tensor, trained: tuple[int, ...]) -> Tensor:
    if isinstance(sae, FunctionalSae):
        return sae.decode(sae.encode(x))
    own = x if x.shape[2:] == trained else resampled(x, trained)
    output = sae(flat_input(own)) * sqrt(prod(trained))
    return output if x.shape[2:] == trained else resampled(output, x.shape[2:])


def _recovered(sae: FunctionalSae | FlatSae, data: FieldData) -> tuple[float, float]:
    """mmcs and everywhere, on a finer grid, since places lie between the points of the training grid."""
    assert data.planted is not None
    fine = [_FINER * n for n in data.grid]
    planted = resampled(data.planted, fine)
    if isinstance(sae, FunctionalSae):
        # A functional feature is there at every place, so that the shift makes no difference.
        best = mmcs(shifted_cosines(planted, sae.kernels(fine)))
        return best, best
    similarity = shifted_cosines(planted, resampled(sae.atoms(), fine))
    return mmcs(similarity), mmcs_everywhere(similarity)
