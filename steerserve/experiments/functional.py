"""The experiment on functions over a grid: recovery, other resolutions, and where a flat SAE is better."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor

from steerserve.sae.architectures.functional import FunctionalSae, from_modes

from .field_run import FieldData, FieldRun, flat_input, judge, judge_taps
from .fields import Events, ShiftedSums, curves, patches, smooth_atoms
from .fit import Recipe, fit
from .flat import FlatSae, parameter_count
from .planted import SparseSums
from .recovery import shifted_cosines

__all__ = ["CONCEPTS", "Example", "FunctionalResult", "Shown", "run"]

CONCEPTS, FIXED_ATOMS = 8, 64
_CURVE_MODES, _CURVE_GRIDS = (16,), ((64,), (33,), (48,), (96,), (128,), (256,))
_PATCH_MODES, _PATCH_GRIDS = (8, 8), ((24, 24), (17, 17), (32, 32), (48, 48))
_ACTIVE, _TRAIN, _HELD_OUT = 2.0, 4096, 512
_CONCEPT_PRICE, _DOMAIN_PRICE = 0.005, 0.2
_BATCH, _LR, _FLAT_LR = 64, 1e-2, 3e-3


@dataclass(frozen=True)
class Shown:
    """Planted kernels [K, *grid], learned ones most like them, shifted onto them; their cosines [K]."""

    planted: Tensor
    learned: Tensor
    cosines: Tensor


@dataclass(frozen=True)
class Example:
    """One held-out curve, and what an SAE makes of it.

    Attributes:
        x, reconstruction: [64]. z: [F, 64], each moved by as much as its feature's kernel is off the planted
            one that it is most like, so that it stands where that one was planted.
        kernel: [F], which planted one that is. events: what the curve is made of.
    """

    x: Tensor
    reconstruction: Tensor
    z: Tensor
    kernel: list[int]
    events: Events


@dataclass(frozen=True)
class FunctionalResult:
    """Every run, and the kernels by data set and the example that the plot shows."""

    runs: list[FieldRun]
    kernels: dict[str, Shown]
    example: Example

    def find(self, data: str, model: str) -> FieldRun:
        """The run of this name."""
        return next(found for found in self.runs if (found.data, found.model) == (data, model))


def run(steps: int, seed: int, bar: Progress | None = None) -> FunctionalResult:
    """Train every SAE of the comparison. Args: steps: of each. seed: decides data, starts and batches."""
    draw = torch.Generator().manual_seed(seed)
    curve, patch = (
        ShiftedSums(curves(16), _CURVE_MODES, _ACTIVE),
        ShiftedSums(patches(8), _PATCH_MODES, _ACTIVE),
    )
    held_out = curve.sample(_HELD_OUT, draw)
    lines = _shifted("curves", curve, held_out, _CURVE_GRIDS, draw)
    planes = _shifted("patches", patch, patch.sample(_HELD_OUT, draw), _PATCH_GRIDS, draw)
    fixed = _fixed(draw)

    on_lines, runs = _compared(lines, _CURVE_MODES, 512, steps, seed, bar)
    on_planes, more = _compared(planes, _PATCH_MODES, None, steps, seed, bar)
    _, less = _compared(fixed, _CURVE_MODES, FIXED_ATOMS, steps, seed, bar)
    kernels = {"curves": _shown(curve, on_lines, (256,)), "patches": _shown(patch, on_planes, (48, 48))}
    return FunctionalResult([*runs, *more, *less], kernels, _example(curve, on_lines, held_out))


def _compared(
    data: FieldData, modes: tuple[int, ...], flat: int | None, steps: int, seed: int, bar: Progress | None
) -> tuple[FunctionalSae, list[FieldRun]]:
    """The functional SAE of a data set; runs of it, of its taps, and of flat ones, of `flat` atoms if any."""
    start = torch.Generator().manual_seed(seed + 1)
    functional = FunctionalSae(
        modes, 1, CONCEPTS, concept_price=_CONCEPT_PRICE, domain_price=_DOMAIN_PRICE, generator=start
    )
    recipe = Recipe(steps, _BATCH, _LR, seed)
    losses = fit(functional, data.train, recipe, name=f"functional, {data.name}", bar=bar)
    runs = [judge("functional", functional, data, losses)]
    if len(data.held_out) > 1:
        runs.append(judge_taps("same kernels as taps", functional, data))
    width = len(data.train[0].flatten())
    fewest = max(1, (parameter_count(functional) - width) // (2 * width + 1))
    for atoms in (flat, fewest):
        if atoms is None:
            continue
        name = "flat, equal parameters" if atoms == fewest else f"flat, {atoms} latents"
        sae = FlatSae(data.train.shape[1:], atoms, l1=_DOMAIN_PRICE, generator=start)
        recipe = Recipe(steps, _BATCH, _FLAT_LR, seed)
        losses = fit(sae, flat_input(data.train), recipe, name=f"{name}, {data.name}", bar=bar)
        runs.append(judge(name, sae, data, losses))
    return functional, runs


def _shifted(
    name: str,
    source: ShiftedSums,
    held_out: Events,
    grids: tuple[tuple[int, ...], ...],
    draw: torch.Generator,
) -> FieldData:
    """Shifted kernels, judged on every grid."""
    train = source.sample(_TRAIN, draw).on_grid(grids[0])
    planted = from_modes(source.kernels, source.modes, grids[0])
    return FieldData(name, grids[0], train, {grid: held_out.on_grid(grid) for grid in grids}, planted)


def _fixed(draw: torch.Generator) -> FieldData:
    """As many unrelated atoms as there are points, each at one place only."""
    grid = _CURVE_GRIDS[0]
    atoms = smooth_atoms(FIXED_ATOMS, _CURVE_MODES[0], grid[0], draw)
    source = SparseSums(atoms * grid[0] ** 0.5, _ACTIVE, noise=0.0)
    train, held_out = source.sample(_TRAIN, draw)[0], source.sample(_HELD_OUT, draw)[0]
    return FieldData("fixed places", grid, train, {grid: held_out}, None)


@torch.no_grad()
def _shown(source: ShiftedSums, sae: FunctionalSae, grid: tuple[int, ...]) -> Shown:
    """For each planted kernel the learned one that is most like it at its best shift."""
    planted, learned = from_modes(source.kernels, source.modes, grid), sae.kernels(grid)
    similarity = shifted_cosines(planted, learned)
    best = similarity.flatten(2).amax(2).argmax(1)
    axes = tuple(range(len(grid)))
    aligned = []
    for concept, feature in enumerate(best.tolist()):
        # At s, planted(t − s) was compared with learned(t): moving the learned one back by s aligns them.
        place = int(similarity[concept, feature].argmax())
        shift = [-int(i) for i in torch.unravel_index(torch.tensor(place), grid)]
        aligned.append(learned[feature, 0].roll(shift, axes))
    return Shown(planted[:, 0], torch.stack(aligned), similarity.flatten(1).amax(1))


@torch.no_grad()
def _example(source: ShiftedSums, sae: FunctionalSae, events: Events) -> Example:
    """The held-out curve whose three events, of three kernels, are farthest from each other and the ends."""
    index = max(range(len(events.place)), key=lambda i: _gap(events, i))
    one = slice(index, index + 1)
    parts = (events.concept[one], events.place[one], events.strength[one])
    chosen = Events(events.coefficients[one], events.modes, *parts)
    x = chosen.on_grid((64,))
    z = sae.encode(x)
    similarity = shifted_cosines(from_modes(source.kernels, source.modes, (64,)), sae.kernels((64,)))
    kernel = similarity.amax(2).argmax(0).tolist()
    offset = [int(similarity[k, feature].argmax()) for feature, k in enumerate(kernel)]
    placed = torch.stack([line.roll(s, 0) for line, s in zip(z[0], offset, strict=True)])
    return Example(x[0, 0], sae.decode(z)[0, 0], placed, kernel, chosen)


def _gap(events: Events, index: int) -> float:
    """The least distance of two events, or of one from 0 or 1; −1 unless they are three, of three kernels."""
    on = events.strength[index] > 0
    if int(on.sum()) != 3 or len(events.concept[index, on].unique()) != 3:
        return -1.0
    ends = torch.tensor([0.0, 1.0])
    places = torch.cat((ends, events.place[index, on, 0])).sort().values
    return float(places.diff().min())
