"""An SAE opened for serving: its weights stay on disk, memory-mapped, until a feature is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import CheckpointError

from .activation import Activation
from .encoders import Encoder
from .hook import Hook
from .manifest import Manifest
from .normalisation import Normalisation
from .reader import RowReader
from .router import Router
from .rows import FeatureRows

__all__ = ["Activation", "Sae", "Stored"]

_CHUNK = 4096


@dataclass(frozen=True)
class Stored:
    """The weights as stored, and what has to be folded into each row as it is read.

    Attributes:
        encoder: [F, d], a view of the mapped file, any float dtype; zeros where features have no row of
            their own (`Sae.encoder`).
        decoder: [F, d], likewise.
        bias: [F], likewise, added to the encoder's product.
        pre_bias: [d] float32, subtracted from the (scaled) input; None where the SAE subtracts nothing.
        b_dec: [d] float32, the decoder's bias in the model's own scale.
        encoder_scale: [F] float32, what each encoder row and bias is multiplied by.
        decoder_scale: [F] float32, what each decoder row is multiplied by.
        input_scale: scalar the SAE multiplies its input by.
    """

    encoder: Tensor
    decoder: Tensor
    bias: Tensor
    pre_bias: Tensor | None
    b_dec: Tensor
    encoder_scale: Tensor
    decoder_scale: Tensor
    input_scale: float


@dataclass(frozen=True)
class Sae:
    """A sparse autoencoder on disk.

    Attributes:
        architecture: as trained ("standard", "jumprelu", "gated", "batchtopk", "topk", …).
        d_in: width of the residual stream it reads.
        d_sae: number of features.
        hook: where it was trained, or None where its files do not say.
        path: its weights file.
        manifest: our record beside it, if there is one.
        refusal: why it cannot be served exactly at all, or None if it can.
        needs_resident: why its activations need the whole SAE on the device (see Resident), or None where
            each feature is computed by itself.
        top_k: how many features a top-k SAE keeps of a token; None otherwise.
        normalisation: what is done to each token before it is encoded; rows() are in normalised scale.
        router: of a switch SAE, what chooses the expert; None otherwise.
        encoder: what encodes tokens where features have no row of their own (kron, vaease), its tensors as
            stored; None otherwise.
        reader: of a large file, what reads single rows of it; None where they are taken from the mapping.
    """

    architecture: str
    d_in: int
    d_sae: int
    hook: Hook | None
    path: Path
    stored: Stored = field(repr=False)
    activation: Activation = field(repr=False)
    manifest: Manifest | None = field(default=None, repr=False)
    statistics: dict[str, Tensor] = field(default_factory=dict, repr=False)
    refusal: str | None = None
    needs_resident: str | None = None
    top_k: int | None = None
    normalisation: Normalisation = "none"
    router: Router | None = None
    encoder: Encoder | None = field(default=None, repr=False)
    reader: RowReader | None = field(default=None, repr=False)

    @property
    def per_feature(self) -> bool:
        """Whether naming k features costs O(k·d), whatever the size of the dictionary."""
        return self.refusal is None and self.needs_resident is None

    @property
    def b_dec(self) -> Tensor:
        """[d_in] float32: what the decoder adds to Σ f_j·d_j, in the model's own scale."""
        return self.stored.b_dec

    def max_activation(self, feature: int) -> float | None:
        """The largest activation on record (raw units), or None without such statistics."""
        return self._statistic("max_activation", feature)

    def firing_rate(self, feature: int) -> float | None:
        """The share of tokens on which the feature fired, or None without such statistics."""
        return self._statistic("firing_rate", feature)

    def rows(self, features: Sequence[int]) -> FeatureRows:
        """The named features, folded; reads nothing of the file but their rows.

        Where a feature has no encoder row of its own (`encoder`), that row and its bias are zeros.

        Args: features: k indices in [0, d_sae), in any order.
        Returns: k rows.
        Raises: CheckpointError if the SAE cannot be served, a weight of these rows is not finite, or an index
            is out of range.
        """
        if self.refusal is not None:
            raise CheckpointError(self.refusal, path=self.path)
        for feature in features:
            self._check_index(feature)
        rows = self._fold(torch.tensor(list(features), dtype=torch.long))
        # A small file was scanned when it was opened, a large one was not; and folding may overflow.
        for name in ("encoder", "bias", "scale", "shift", "decoder"):
            if not torch.isfinite(getattr(rows, name)).all():
                raise CheckpointError("expected finite folded weights", path=self.path, tensor=name)
        if not (rows.threshold < torch.inf).all():
            raise CheckpointError("expected a finite threshold", path=self.path, tensor="threshold")
        return rows

    def encode(self, x: Tensor) -> Tensor:
        """Activations of every feature: the whole encoder, for tests and evaluation.

        Args: x: [tokens, d_in], the residual stream in the model's own scale.
        Returns: [tokens, d_sae] float32, raw units.
        Raises: CheckpointError if the SAE cannot be served, normalises or routes each token, or has no
            encoder row of each feature.
        """
        self._check_whole()
        dense = torch.cat([rows.activations(x) for rows in self._chunks()], dim=-1)
        if self.top_k is None:
            return dense
        # Rectified values have the same positive top k as the pre-activations, and zeros add nothing.
        values, indices = dense.topk(self.top_k, dim=-1)
        return torch.zeros_like(dense).scatter_(-1, indices, values)

    def decode(self, f: Tensor) -> Tensor:
        """The reconstruction Σ f_j·d_j + b_dec of whole activation vectors.

        Args: f: [tokens, d_sae], raw units.
        Returns: [tokens, d_in] float32, in the model's own scale.
        Raises: as `encode`.
        """
        self._check_whole()
        out = self.b_dec.expand(f.shape[0], -1).clone()
        for part, rows in zip(torch.split(f.float(), _CHUNK, dim=-1), self._chunks(), strict=True):
            out += part @ rows.decoder
        return out

    def autoencode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and reconstruction: see `encode` and `decode`."""
        f = self.encode(x)
        return f, self.decode(f)

    def _check_whole(self) -> None:
        if self.refusal is not None:
            raise CheckpointError(self.refusal, path=self.path)
        if self.normalisation != "none" or self.router is not None or self.encoder is not None:
            message = f"expected an encoder with a row per feature (use Resident): {self.needs_resident}"
            raise CheckpointError(message, path=self.path)

    def _chunks(self) -> Iterator[FeatureRows]:
        for start in range(0, self.d_sae, _CHUNK):
            yield self._fold(slice(start, min(start + _CHUNK, self.d_sae)))

    def _fold(self, which: Tensor | slice) -> FeatureRows:
        stored, act = self.stored, self.activation
        # Folding cancels large terms (b_enc against W·b_dec), so it is done in float64 and rounded once.
        encoder = self._pick(stored.encoder, which).double()
        bias = self._pick(stored.bias, which).double()
        if stored.pre_bias is not None:
            bias = bias - encoder @ stored.pre_bias.double()
        row_scale = self._pick(stored.encoder_scale, which).double()
        decoder_scale = self._pick(stored.decoder_scale, which).double() / stored.input_scale
        return FeatureRows(
            encoder=(encoder * (row_scale * stored.input_scale).unsqueeze(1)).float().contiguous(),
            bias=(bias * row_scale).float(),
            threshold=_own(self._pick(act.threshold, which)),
            scale=_own(self._pick(act.scale, which)),
            shift=_own(self._pick(act.shift, which)),
            floor=_own(self._pick(act.floor, which)),
            decoder=(self._pick(stored.decoder, which).double() * decoder_scale.unsqueeze(1))
            .float()
            .contiguous(),
        )

    def _pick(self, part: Tensor, which: Tensor | slice) -> Tensor:
        """`part[which]`; not by brackets, for they start torch's threads, which wait for busy cores."""
        if isinstance(which, slice):
            return part[which]
        if self.reader is not None and self.reader.holds(part):
            return self.reader.read(part, which.tolist())
        return part.index_select(0, which)

    def _statistic(self, name: str, feature: int) -> float | None:
        self._check_index(feature)
        values = self.statistics.get(name)
        return None if values is None else float(values[feature])

    def _check_index(self, feature: int) -> None:
        if not 0 <= feature < self.d_sae:
            raise CheckpointError(f"expected features in [0, {self.d_sae}), got {feature}", path=self.path)


def _own(part: Tensor) -> Tensor:
    """A float32 copy, contiguous even where `part` is a constant expanded to length."""
    return part.float().clone(memory_format=torch.contiguous_format)
