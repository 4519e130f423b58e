"""Functions with known structure: sums of few band-limited kernels, each shifted to any place on a torus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi, sin

import torch
from torch import Tensor

from steerserve.sae.architectures.functional import from_modes, to_modes

__all__ = ["Events", "ShiftedSums", "curves", "patches", "smooth_atoms"]

_FINE = 256
_SLOTS = 8


@dataclass(frozen=True)
class Events:
    """What n functions are made of; `on_grid` writes them out at any resolution.

    Attributes:
        coefficients: complex [n, C, ...], their Fourier modes, in the order of `to_modes`.
        modes: highest frequency along each axis.
        concept: [n, 8] index of the kernel. place: [n, 8, D] in [0, 1)^D. strength: [n, 8], 0 for no event.
    """

    coefficients: Tensor
    modes: tuple[int, ...]
    concept: Tensor
    place: Tensor
    strength: Tensor

    def on_grid(self, grid: Sequence[int]) -> Tensor:
        """[n, C, *grid], exact: the functions are band-limited."""
        return from_modes(self.coefficients, self.modes, grid)


@dataclass(frozen=True)
class ShiftedSums:
    """u(t) = Σ_j a_j k_{c_j}(t − s_j): up to 8 events, their places uniform on the torus, off any grid.

    Attributes:
        kernels: complex [K, C, ...], modes of kernels of unit L² norm. modes: highest frequency per axis.
        active: events in a function, on average, at most 8. Their strengths lie between ½ and 1½.
    """

    kernels: Tensor
    modes: tuple[int, ...]
    active: float

    def sample(self, count: int, generator: torch.Generator) -> Events:
        """`count` functions."""
        size = (count, _SLOTS)
        concept = torch.randint(len(self.kernels), size, generator=generator)
        place = torch.rand(*size, len(self.modes), generator=generator)
        present = torch.rand(size, generator=generator) < self.active / _SLOTS
        strength = present * (0.5 + torch.rand(size, generator=generator))
        phase = torch.tensordot(place, _frequencies(self.modes), dims=1)
        turned = strength.view(*size, *[1] * len(self.modes)) * torch.exp(-2j * pi * phase)
        total = torch.einsum("nj...,njc...->nc...", turned, self.kernels[concept])
        return Events(total, self.modes, concept, place, strength)


def curves(modes: int) -> Tensor:
    """Six kernels on the circle, as modes complex [6, 1, M + 1].

    A bump, a chirp, a bump in a dark surround, and wave packets of three frequencies.
    """
    t = _centred(_FINE)
    wide, narrow = torch.exp(-((t / 0.09) ** 2) / 2), torch.exp(-((t / 0.04) ** 2) / 2)
    shapes = [
        narrow,
        torch.sin(2 * pi * (7 * t + 25 * t**2)) * wide,
        (1 - (t / 0.04) ** 2) * narrow,
        torch.cos(2 * pi * 8 * t) * wide,
        torch.sin(2 * pi * 12 * t) * wide,
        torch.sin(2 * pi * 4 * t) * wide,
    ]
    return _unit_modes(torch.stack(shapes).unsqueeze(1), (modes,))


def patches(modes: int) -> Tensor:
    """Six kernels on the 2-D torus, as modes complex [6, 1, 2M + 1, M + 1].

    Gratings at 0°, 45°, 90° and 135° in an envelope, a ring, and a spot in a dark surround.
    """
    y, x = torch.meshgrid(_centred(_FINE), _centred(_FINE), indexing="ij")
    shapes = []
    for angle in (0.0, pi / 4, pi / 2, 3 * pi / 4):
        along, across = x * cos(angle) + y * sin(angle), y * cos(angle) - x * sin(angle)
        envelope = torch.exp(-((along / 0.12) ** 2 + (across / 0.08) ** 2) / 2)
        shapes.append(envelope * torch.cos(2 * pi * 4 * across))
    radius = (x**2 + y**2).sqrt()
    shapes.append(torch.exp(-(((radius - 0.2) / 0.06) ** 2) / 2))
    shapes.append((1 - (radius / 0.1) ** 2) * torch.exp(-((radius / 0.1) ** 2) / 2))
    return _unit_modes(torch.stack(shapes).unsqueeze(1), (modes, modes))


def smooth_atoms(count: int, modes: int, grid: int, generator: torch.Generator) -> Tensor:
    """`count` unrelated band-limited functions at places of their own: [count, 1, grid], unit norm.

    A noise of frequencies up to `modes` in an envelope; no two are shifts of each other.
    """
    noise = torch.randn(count, 1, 2 * modes + 1, generator=generator)
    noise = from_modes(to_modes(noise, (modes,)), (modes,), (grid,))
    place = torch.rand(count, 1, 1, generator=generator)
    distance = (torch.arange(grid) / grid - place + 0.5) % 1 - 0.5
    atoms = noise * torch.exp(-((distance / 0.1) ** 2) / 2)
    unit: Tensor = atoms / atoms.norm(dim=2, keepdim=True)
    return unit


def _centred(points: int) -> Tensor:
    """Places on the circle in [−½, ½), 0 first."""
    places: Tensor = torch.fft.fftfreq(points)
    return places


def _unit_modes(values: Tensor, modes: tuple[int, ...]) -> Tensor:
    """Modes of kernels given on a fine grid, scaled to unit L² norm as they are after the truncation."""
    coefficients = to_modes(values, modes)
    left = from_modes(coefficients, modes, [2 * m + 1 for m in modes])
    norm = left.square().flatten(2).mean(2).sum(1).sqrt()
    return coefficients / norm.view(-1, *[1] * (coefficients.ndim - 1))


def _frequencies(modes: tuple[int, ...]) -> Tensor:
    """[D, 2M₁+1, …, M_D+1]: the frequency of each coefficient along each axis."""
    both = [torch.cat((torch.arange(m + 1), torch.arange(-m, 0))) for m in modes[:-1]]
    lines = [*both, torch.arange(modes[-1] + 1)]
    return torch.stack(torch.meshgrid(*lines, indexing="ij")).float()
