"""Functional SAE, an experiment: a feature's activation is a function on the grid. Never served.

Source: Tolooshams, Shen and Anandkumar, arXiv:2509.03738, the Fourier kind (SAE-FNO): concepts are integral
operators parametrised by their low Fourier modes, sparse both in which concepts are active and in where.
Written from its abstract and from summaries, so no equation is named. Our choices: no `lifting`, an encoder
of one layer, unit kernels, the start, and λ_c·L² + λ_d·L¹ as the price of an activation function.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

__all__ = ["FunctionalSae", "from_modes", "to_modes"]

# Keeps the gradient of ‖z‖ finite where z = 0.
_TINY = 1e-12


def to_modes(values: Tensor, modes: Sequence[int]) -> Tensor:
    """The low Fourier coefficients of real functions on the periodic unit cube, whatever their grid.

    Args:
        values: [..., *grid], the functions at i/N along each of the last len(modes) axes.
        modes: the highest frequency M kept along each axis; the grid has at least 2M + 1 points there.
    Returns: complex [..., 2M₁+1, …, M_D+1], frequencies 0…M, −M…−1, on the last axis 0…M only.
    Raises: ValueError if the grid is too coarse.
    """
    grid = _checked(values.shape[-len(modes) :], modes)
    spectrum: Tensor = torch.fft.rfftn(values, dim=tuple(range(-len(grid), 0)), norm="forward")
    for axis, (n, m) in enumerate(zip(grid[:-1], modes, strict=False), start=-len(grid)):
        spectrum = spectrum.index_select(axis, _kept(n, m, values.device))
    return spectrum[..., : modes[-1] + 1]


def from_modes(coefficients: Tensor, modes: Sequence[int], grid: Sequence[int]) -> Tensor:
    """The functions of `to_modes` on a grid of any resolution.

    Args: coefficients: complex [..., 2M₁+1, …, M_D+1]. grid: points along each axis, at least 2M + 1.
    Returns: real [..., *grid].
    Raises: ValueError if the grid is too coarse.
    """
    grid = _checked(grid, modes)
    spectrum = torch.nn.functional.pad(coefficients, (0, grid[-1] // 2 - modes[-1]))
    for axis, (n, m) in enumerate(zip(grid[:-1], modes, strict=False), start=-len(grid)):
        wider = spectrum.new_zeros([*spectrum.shape[:axis], n, *spectrum.shape[axis:][1:]])
        spectrum = wider.index_copy(wider.ndim + axis, _kept(n, m, spectrum.device), spectrum)
    values: Tensor = torch.fft.irfftn(spectrum, s=grid, dim=tuple(range(-len(grid), 0)), norm="forward")
    return values


class FunctionalSae(nn.Module):
    """x̂ = Σ_i d_i ∗ z_i + b_dec with z_i = relu(Σ_c e_ic ∗ (x_c − b_dec,c) + b_i), ∗ convolution on a torus.

    Both convolutions are products of Fourier coefficients, kept up to frequency M; the weights are those
    coefficients, so that the same SAE reads and writes functions on any grid of at least 2M + 1 points.
    With M at half the training grid it is a convolutional SAE with a kernel as wide as the grid.

    Args:
        modes: the highest frequency M along each axis of the grid.
        channels: values C of the function at each point.
        d_sae: number of concepts F.
        concept_price: λ of Σ_i ‖z_i‖_{L²}, which switches concepts off.
        domain_price: λ of Σ_i ‖z_i‖_{L¹}, which narrows where they are on.
        generator: decides the starting kernels.
    Raises: ValueError if a size is not positive.
    """

    def __init__(
        self,
        modes: Sequence[int],
        channels: int,
        d_sae: int,
        *,
        concept_price: float,
        domain_price: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not modes or min(*modes, channels, d_sae) < 1:
            raise ValueError(
                f"expected positive sizes, got modes {modes}, {channels} channels, d_sae {d_sae}"
            )
        self.modes, self.channels, self.d_sae = tuple(modes), channels, d_sae
        self.concept_price, self.domain_price = concept_price, domain_price
        self.coarse = tuple(2 * m + 1 for m in self.modes)
        start = torch.randn(d_sae, channels, *self.coarse, generator=generator) / prod(self.coarse) ** 0.5
        decoder = torch.view_as_real(to_modes(start, self.modes))
        # Real and imaginary parts apart, [F, C, 2M₁+1, …, M_D+1, 2], so that optimizers see real numbers.
        self.decoder = nn.Parameter(decoder)
        self.encoder = nn.Parameter(decoder * decoder.new_tensor([1.0, -1.0]))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(channels))

    def kernels(self, grid: Sequence[int]) -> Tensor:
        """[F, C, *grid]: the decoder's kernels d_i as functions, each of unit L² norm, centred at 0."""
        return from_modes(self._unit_decoder(), self.modes, grid)

    def encode(self, x: Tensor) -> Tensor:
        """Activation functions of functions on a grid.

        Args: x: [B, C, *grid], at least 2M + 1 points along each axis. Returns: [B, F, *grid], not negative.
        Raises: ValueError if x has another number of axes or channels, or too few points.
        """
        if x.ndim != len(self.modes) + 2 or x.shape[1] != self.channels:
            wanted = f"[B, {self.channels}, {', '.join('N' for _ in self.modes)}]"
            raise ValueError(f"expected functions {wanted}, got {[*x.shape]}")
        spectrum = to_modes(x - self._spread(self.b_dec), self.modes)
        # A kernel of unit norm answers its own kind with a bump of height 1 and integral of about
        # 1/(points of the coarse grid): times that number, an activation integrates to the amplitude.
        gain = prod(self.coarse)
        product = torch.einsum("bc...,fc...->bf...", spectrum, gain * torch.view_as_complex(self.encoder))
        return torch.relu(from_modes(product, self.modes, x.shape[2:]) + self._spread(self.b_enc))

    def decode(self, z: Tensor) -> Tensor:
        """The functions of activation functions: [B, F, *grid] → [B, C, *grid]."""
        product = torch.einsum("bf...,fc...->bc...", to_modes(z, self.modes), self._unit_decoder())
        return from_modes(product, self.modes, z.shape[2:]) + self._spread(self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """x̂: [B, C, *grid]."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor) -> Tensor:
        """Mean over the batch of ‖x − x̂‖²_{L²} + λ_c Σ_i ‖z_i‖_{L²} + λ_d Σ_i ‖z_i‖_{L¹}; a scalar.

        Every norm is an integral over the unit cube, here the grid's mean: its resolution changes nothing.
        """
        z = self.encode(x)
        error = (x - self.decode(z)).square().sum(1).flatten(1).mean(1)
        values = z.flatten(2)
        concept = (values.square().mean(2) + _TINY).sqrt().sum(1)
        domain = values.mean(2).sum(1)
        return (error + self.concept_price * concept + self.domain_price * domain).mean()

    def _unit_decoder(self) -> Tensor:
        """The decoder's coefficients at unit L² norm, which any grid of 2M + 1 points measures (Parseval)."""
        coefficients = torch.view_as_complex(self.decoder)
        values = from_modes(coefficients, self.modes, self.coarse)
        norm = values.square().flatten(2).mean(2).sum(1).clamp(min=_TINY).sqrt()
        return coefficients / norm.view(-1, *[1] * (coefficients.ndim - 1))

    def _spread(self, per_channel: Tensor) -> Tensor:
        return per_channel.view(-1, *[1] * len(self.modes))


def _kept(points: int, modes: int, device: torch.device) -> Tensor:
    """Where frequencies 0…M, −M…−1 lie in a spectrum of `points` coefficients."""
    return torch.cat((torch.arange(modes + 1), torch.arange(points - modes, points))).to(device)


def _checked(grid: Sequence[int], modes: Sequence[int]) -> tuple[int, ...]:
    if len(grid) != len(modes) or any(n < 2 * m + 1 for n, m in zip(grid, modes, strict=True)):
        least = [2 * m + 1 for m in modes]
        raise ValueError(f"expected a grid of at least {least} points for modes {[*modes]}, got {[*grid]}")
    return tuple(grid)
