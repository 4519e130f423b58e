"""A whole SAE on the device: exact activations of every feature, for the tokens that need them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import CheckpointError

from .normalisation import Normalisation, normalise
from .router import Router
from .sae import Activation, Sae

__all__ = ["Encoded", "Resident"]

_COPIED_AT_ONCE = 2**22
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

    The pre-bias is subtracted from each token rather than folded into `bias`: the sums are then rounded as
    where the SAE was trained, which decides between nearly equal features at the edge of a top k.

    Attributes:
        encoder: [F, d], as stored.
        bias, encoder_scale: [F]; pre_j = (w_j·y + b_j)·s_j.
        input_scale, pre_bias: scalar and [d]; y = normalised x·scale − pre_bias.
        activation: the per-feature numbers of the activation formula, [F] each.
        decoder: [F, d], as in Sae.rows().
        b_dec: [d], the decoder's bias.
        top_k: how many features of a token (of its expert, in a switch SAE) are kept; None for all.
        normalisation, router: see Sae.
    """

    encoder: Tensor
    bias: Tensor
    encoder_scale: Tensor
    input_scale: float
    pre_bias: Tensor
    activation: Activation
    decoder: Tensor
    b_dec: Tensor
    top_k: int | None
    normalisation: Normalisation
    router: Router | None

    @classmethod
    def of(cls, sae: Sae, device: torch.device | str = "cpu") -> Resident:
        """Copy an SAE to the device, in chunks of its mapped file.

        Raises: CheckpointError if it cannot be served exactly, or a weight is not finite.
        """
        if sae.refusal is not None:
            raise CheckpointError(sae.refusal, path=sae.path)
        stored, act = sae.stored, sae.activation
        pre_bias = torch.zeros(sae.d_in) if stored.pre_bias is None else stored.pre_bias
        resident = cls(
            encoder=_copy(stored.encoder, device),
            bias=_vector(stored.bias, device),
            encoder_scale=_vector(stored.encoder_scale, device),
            input_scale=stored.input_scale,
            pre_bias=_vector(pre_bias, device),
            activation=Activation(
                *(_vector(part, device) for part in (act.threshold, act.scale, act.shift, act.floor))
            ),
            decoder=_copy(stored.decoder, device, stored.decoder_scale.double() / stored.input_scale),
            b_dec=_vector(stored.b_dec, device),
            top_k=sae.top_k,
            normalisation=sae.normalisation,
            router=None if sae.router is None else sae.router.to(device),
        )
        resident._check_finite(sae.path)
        return resident

    @property
    def d_sae(self) -> int:
        """F."""
        return self.encoder.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        act = self.activation
        vectors = (self.bias, self.encoder_scale, act.threshold, act.scale, act.shift, act.floor)
        parts = (self.encoder, self.decoder, *vectors, self.pre_bias, self.b_dec)
        routing = () if self.router is None else (self.router.weight, self.router.bias)
        return sum(part.numel() * part.element_size() for part in (*parts, *routing))

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations to encode one token: 2·d for each feature and expert that is weighed.

        Reconstructing it (`error: "drop"`) takes 2·d·F more.
        """
        features, d = self.encoder.shape
        if self.router is None:
            return 2 * d * features
        return 2 * d * (self.router.experts + features // self.router.experts)

    @property
    def tokens_at_once(self) -> int:
        """How many tokens to encode in one call, so that each [n, F] takes at most 64 MiB."""
        return max(1, _ACTIVATIONS_AT_ONCE // self.d_sae)

    def encode(self, x: Tensor) -> Encoded:
        """Exact activations of every feature.

        A top-k SAE keeps the k largest of all pre-activations of the token, rectified, as torch.topk picks
        them where some are equal. A switch SAE encodes the token by the chosen expert alone.

        Args: x: [n, d], the residual stream in the model's own scale.
        Returns: f, gain and offset. NaN in x comes out as NaN.
        Source: sae_lens 6.54, `SAE.process_sae_in` and the architectures' `encode`.
        """
        x = x.float()
        normalised = normalise(x, self.normalisation)
        y = normalised.x * self.input_scale - self.pre_bias
        gain = normalised.gain[:, 0]
        if self.router is None:
            f = self._features(y, 0, self.d_sae)
        else:
            expert, weight = self.router.route(x)
            f, gain = self._routed(y, expert, self.router.experts), gain * weight
        return Encoded(f, gain, normalised.gain * self.b_dec + normalised.mean)

    def decode(self, f: Tensor, encoded: Encoded) -> Tensor:
        """The reconstruction of the tokens of `encoded` from activations that may have been edited since.

        Args: f: [n, F], raw units.
        Returns: [n, d] float32, in the model's own scale.
        """
        return encoded.gain.unsqueeze(1) * (f.float() @ self.decoder) + encoded.offset

    def strongest(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The n most active features of each token, the most active first.

        Where fewer than n are active, the rest have value 0 and arbitrary indices.

        Args: x: [tokens, d]. n: at most F.
        Returns: indices [tokens, n] int64, and values [tokens, n] float32 in raw units.
        """
        tops = [self.encode(part).f.topk(n, dim=-1) for part in x.split(self.tokens_at_once)]
        return torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops])

    def _check_finite(self, path: Path) -> None:
        names = ("encoder", "bias", "encoder_scale", "pre_bias", "decoder", "b_dec")
        parts = {name: getattr(self, name) for name in names}
        parts |= {"scale": self.activation.scale, "shift": self.activation.shift}
        # −inf stands for no threshold.
        parts["threshold"] = self.activation.threshold.clamp(min=0)
        for name, part in parts.items():
            if not _finite(part):
                message = "expected finite weights, got NaN or infinity"
                raise CheckpointError(message, path=path, tensor=name)

    def _routed(self, y: Tensor, expert: Tensor, experts: int) -> Tensor:
        f = y.new_zeros(y.shape[0], self.d_sae)
        size = self.d_sae // experts
        for e in expert.unique().tolist():
            tokens = torch.nonzero(expert == e)[:, 0]
            own = self._features(y.index_select(0, tokens), e * size, size)
            f.narrow(1, e * size, size).index_copy_(0, tokens, own)
        return f

    def _features(self, y: Tensor, start: int, length: int) -> Tensor:
        """The activations of features [start, start + length) from the SAE's own input."""

        def own(part: Tensor) -> Tensor:
            return part.narrow(0, start, length)

        pre = y @ own(self.encoder).T
        pre.add_(own(self.bias)).mul_(own(self.encoder_scale))
        if self.top_k is not None:
            values, indices = pre.topk(min(self.top_k, length), dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter_(-1, indices, values.relu_())
        act = self.activation
        value = torch.maximum(own(act.scale) * pre + own(act.shift), own(act.floor))
        # So asked, a NaN stays one.
        return torch.where(pre <= own(act.threshold), 0.0, value)


def _copy(matrix: Tensor, device: torch.device | str, row_scale: Tensor | None = None) -> Tensor:
    """[F, d] float32 on the device, in the memory order of the mapped file, which is read in that order."""
    out = torch.empty_like(matrix, dtype=torch.float32, device=device)
    major = 0 if matrix.stride(0) >= matrix.stride(1) else 1
    rows, length = matrix.shape[major], max(1, _COPIED_AT_ONCE // matrix.shape[1 - major])
    for start in range(0, rows, length):
        size = min(length, rows - start)
        part = matrix.narrow(major, start, size)
        if row_scale is not None:
            scale = row_scale.narrow(0, start, size) if major == 0 else row_scale
            part = part.double() * scale.unsqueeze(1)
        out.narrow(major, start, size).copy_(part)
    return out


def _vector(part: Tensor, device: torch.device | str) -> Tensor:
    return part.to(device, torch.float32, copy=True)


def _finite(part: Tensor) -> bool:
    # Extremes pass on a NaN and allocate nothing.
    lowest, highest = torch.aminmax(part)
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))
