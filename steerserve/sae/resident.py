"""A whole SAE on the device: exact activations of every feature, for the tokens that need them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import CheckpointError

from .encoders import Encoder, Linear, Routed
from .encoders.base import copied_matrix, copied_vector
from .normalisation import Normalisation, normalise
from .sae import Sae

__all__ = ["Encoded", "Resident"]

_ACTIVATIONS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Encoded:
    """Tokens in the SAE's features: x ≈ gain·(f @ decoder) + offset.

    Attributes:
        f: [n, F] float32, raw units.
        gain: [n] float32: the token's σ under layer norm, ‖x‖/√d under constant_norm_rescale, the router's
            probability of the chosen expert in a switch SAE; else 1.
        offset: [n, d] float32, what the decoder adds besides.
    """

    f: Tensor
    gain: Tensor
    offset: Tensor

    def take(self, tokens: Tensor) -> Encoded:
        """The named tokens only. Args: tokens: [m] int64."""
        return Encoded(*(part.index_select(0, tokens) for part in (self.f, self.gain, self.offset)))


@dataclass(frozen=True, eq=False)
class Resident:
    """An SAE's encoder and decoder on the device, in float32.

    The pre-bias is subtracted from each token rather than folded into a bias: the sums are then rounded as
    where the SAE was trained, which decides between nearly equal features at the edge of a top k.

    Attributes:
        encoder: from y, the SAE's own input, to the activations.
        input_scale, pre_bias: scalar and [d]; y = normalised x·scale − pre_bias.
        decoder: [F, d], as in Sae.rows().
        b_dec: [d], the decoder's bias.
        normalisation: see Sae.
    """

    encoder: Encoder
    input_scale: float
    pre_bias: Tensor
    decoder: Tensor
    b_dec: Tensor
    normalisation: Normalisation

    @classmethod
    def of(cls, sae: Sae, device: torch.device | str = "cpu") -> Resident:
        """Copy an SAE to the device, in chunks of its mapped file.

        Raises: CheckpointError if it cannot be served exactly, or a weight is not finite.
        """
        if sae.refusal is not None:
            raise CheckpointError(sae.refusal, path=sae.path)
        stored = sae.stored
        pre_bias = torch.zeros(sae.d_in) if stored.pre_bias is None else stored.pre_bias
        decoder_scale = stored.decoder_scale.double() / stored.input_scale
        resident = cls(
            encoder=_encoder(sae).to(device),
            input_scale=stored.input_scale,
            pre_bias=copied_vector(pre_bias, device),
            decoder=copied_matrix(stored.decoder, device, decoder_scale),
            b_dec=copied_vector(stored.b_dec, device),
            normalisation=sae.normalisation,
        )
        resident._check_finite(sae.path)
        return resident

    @property
    def d_in(self) -> int:
        """d."""
        return self.decoder.shape[1]

    @property
    def d_sae(self) -> int:
        """F."""
        return self.decoder.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(part.numel() * part.element_size() for part in self._tensors().values())

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations to encode one token: two for each weight that it meets.

        Reconstructing it (`error: "drop"`) takes 2·d·F more.
        """
        return self.encoder.flops_per_token

    @property
    def tokens_at_once(self) -> int:
        """How many tokens to encode in one call, so that each [n, F] takes at most 64 MiB."""
        return max(1, _ACTIVATIONS_AT_ONCE // self.d_sae)

    def encode(self, x: Tensor) -> Encoded:
        """Exact activations of every feature.

        Args: x: [n, d], the residual stream in the model's own scale.
        Returns: f, gain and offset. NaN in x comes out as NaN.
        Source: sae_lens 6.54, `SAE.process_sae_in` and the architectures' `encode`.
        """
        x = x.float()
        normalised = normalise(x, self.normalisation)
        y = normalised.x * self.input_scale - self.pre_bias
        f, weight = self.encoder.encode(y, x)
        gain = normalised.gain[:, 0]
        if weight is not None:
            gain = gain * weight
        return Encoded(f, gain, normalised.gain * self.b_dec + normalised.mean)

    def decode(self, f: Tensor, encoded: Encoded) -> Tensor:
        """The reconstruction of the tokens of `encoded` from activations that may have been edited since.

        Args: f: [n, F], raw units.
        Returns: [n, d] float32, in the model's own scale.
        """
        return encoded.gain.unsqueeze(1) * (f.float() @ self.decoder) + encoded.offset

    def autoencode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations [n, F] and reconstruction [n, d] of tokens on any device: see `encode` and `decode`."""
        encoded = self.encode(x.to(self.decoder.device))
        return encoded.f, self.decode(encoded.f, encoded)

    def strongest(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The n most active features of each token, the most active first.

        Where fewer than n are active, the rest have value 0 and arbitrary indices.

        Args: x: [tokens, d]. n: at most F.
        Returns: indices [tokens, n] int64, and values [tokens, n] float32 in raw units.
        """
        tops = [self.encode(part).f.topk(n, dim=-1) for part in x.split(self.tokens_at_once)]
        return torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops])

    def _tensors(self) -> dict[str, Tensor]:
        own = {"pre_bias": self.pre_bias, "decoder": self.decoder, "b_dec": self.b_dec}
        return self.encoder.tensors() | own

    def _check_finite(self, path: Path) -> None:
        for name, part in self._tensors().items():
            # There, −inf stands for none.
            bounded = part.clamp(min=0) if name in ("floor", "threshold") else part
            if not _finite(bounded):
                message = "expected finite weights, got NaN or infinity"
                raise CheckpointError(message, path=path, tensor=name)


def _encoder(sae: Sae) -> Encoder:
    """The SAE's encoder, its tensors as stored."""
    if sae.encoder is not None:
        return sae.encoder
    stored = sae.stored
    linear = Linear(stored.encoder, stored.bias, stored.encoder_scale, sae.activation, sae.top_k)
    return linear if sae.router is None else Routed(linear, sae.router)


def _finite(part: Tensor) -> bool:
    # Extremes pass on a NaN and allocate nothing.
    lowest, highest = torch.aminmax(part)
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))
