"""An SAE under judgement: any architecture, behind one way to encode and to reconstruct."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import ConfigError
from steerserve.sae import Hook, Sae, open_sae
from steerserve.sae.resident import Encoded, Resident

__all__ = ["Judged", "open_judged"]


@dataclass(frozen=True, eq=False)
class Judged:
    """An opened SAE with its whole encoder and decoder on the device.

    Plain SAEs and those whose decoder depends on the token (layer norm, a switch's expert) are met alike:
    the reconstruction of a token is gain·(f @ decoder) + offset.

    Attributes:
        name: what the report calls it.
        sae: as opened.
        resident: its weights on the device.
        folder: where it was opened, which is where a training log may lie.
    """

    name: str
    sae: Sae = field(repr=False)
    resident: Resident = field(repr=False)
    folder: Path

    @property
    def d_in(self) -> int:
        """Width of the residual stream."""
        return self.sae.d_in

    @property
    def d_sae(self) -> int:
        """Number of features F."""
        return self.sae.d_sae

    @property
    def hook(self) -> Hook | None:
        """Where it was trained, if its files say."""
        return self.sae.hook

    @property
    def decoder(self) -> Tensor:
        """[F, d] float32, in the model's own scale."""
        return self.resident.decoder

    def encode(self, x: Tensor) -> Encoded:
        """Args: x: [n, d], the raw residual stream, on any device."""
        return self.resident.encode(x.to(self.decoder.device))

    def reconstruct(self, x: Tensor) -> Tensor:
        """x̂ [n, d] float32 on the SAE's device, computed in parts so that memory stays bounded."""
        parts = (self.encode(part) for part in x.split(self.resident.tokens_at_once))
        return torch.cat([self.resident.decode(encoded.f, encoded) for encoded in parts])


def open_judged(path: Path, name: str | None = None, device: torch.device | str = "cpu") -> Judged:
    """Open an SAE of any layout to judge it.

    Args: path: its folder or weights file. name: for the report; the folder's name by default.
    Raises: ConfigError if there is nothing at `path`; CheckpointError if it cannot be served exactly.
    """
    if not path.exists():
        raise ConfigError(f"expected an SAE's folder or weights file, found none at {path}")
    sae = open_sae(path)
    folder = path if path.is_dir() else path.parent
    return Judged(name or folder.name or str(path), sae, Resident.of(sae, device), folder)
