"""Tensor-SAE, an experiment: every atom is a rank-1 tensor over (colour, height, width). Never served.

Source: Tensor-SAE, OpenReview MmpRG8AuHY (GRaM workshop, ICLR 2026). Its abstract fixes the atoms and the
"light sparsity prior"; the free encoder, unit atoms and the loss per image follow the authors' own
reimplementation, which says that it too was written from the abstract. The start below is our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

__all__ = ["TensorSae"]


class TensorSae(nn.Module):
    """x̂ = Σ_i z_i a_i⊗b_i⊗c_i + b_dec with z = relu(W_enc·(x − b_dec) + b_enc), all factors of unit norm.

    An atom costs C + H + W parameters instead of C·H·W. The encoder stays free, so that of the whole only
    about half is saved.

    Args:
        shape: (colours C, height H, width W) of one activation.
        d_sae: number of atoms F.
        l1: λ, the price of a unit of activation.
        generator: decides the starting atoms.
    Raises: ValueError if a size is not positive.
    """

    def __init__(
        self, shape: tuple[int, int, int], d_sae: int, *, l1: float, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if min(*shape, d_sae) < 1:
            raise ValueError(f"expected positive sizes, got shape {shape} and d_sae {d_sae}")
        self.shape, self.d_sae, self.l1 = shape, d_sae, l1
        self.colour, self.height, self.width = (
            nn.Parameter(torch.randn(d_sae, size, generator=generator)) for size in shape
        )
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(shape))
        self.w_enc = nn.Parameter(self.atoms().detach().flatten(1))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Unit colour [F, C], height [F, H] and width [F, W] factors; z_i is then ‖z_i a_i⊗b_i⊗c_i‖."""
        return normalize(self.colour, dim=1), normalize(self.height, dim=1), normalize(self.width, dim=1)

    def atoms(self) -> Tensor:
        """[F, C, H, W]: the dictionary written out; each atom has unit norm."""
        return torch.einsum("fc,fh,fw->fchw", *self.factors())

    def encode(self, x: Tensor) -> Tensor:
        """Activations of image-shaped vectors.

        Args: x: [B, C, H, W]. Returns: [B, F], not negative.
        Raises: ValueError if x is of another shape.
        """
        if x.ndim != 4 or x.shape[1:] != self.shape:
            raise ValueError(f"expected activations [B, {', '.join(map(str, self.shape))}], got {[*x.shape]}")
        return torch.relu((x - self.b_dec).flatten(1) @ self.w_enc.T + self.b_enc)

    def decode(self, z: Tensor) -> Tensor:
        """The image of activations [B, F] → [B, C, H, W], without writing the dictionary out."""
        colour, height, width = self.factors()
        spatial = torch.einsum("fh,fw->fhw", height, width).flatten(1)
        image: Tensor = ((z.unsqueeze(1) * colour.T) @ spatial).unflatten(2, self.shape[1:])
        return image + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """x̂: [B, C, H, W]."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor) -> Tensor:
        """Mean over the batch of ‖x − x̂‖² + λ Σ_i z_i; a scalar."""
        z = self.encode(x)
        error = (x - self.decode(z)).square().flatten(1).sum(1)
        return (error + self.l1 * z.sum(1)).mean()
