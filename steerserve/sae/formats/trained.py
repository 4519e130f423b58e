"""What this trainer saves of the architectures that SAELens has no form for: switch, kron and vaease.

Files, and what is in the config, are named as SAELens names them: `cfg.json` and `sae_weights.safetensors`;
`architecture` tells them apart. Each subtracts b_dec from its input; its scale is folded.

    switch: W_enc[d,F], W_dec[F,d], b_dec[d], W_router[E,d], b_router[d]; config: experts, k
    kron:   W_left[d,h·m], b_left, W_right[d,h·n], b_right, W_dec, b_dec; config: heads, base, extension, k
    vaease: W_enc, b_enc[F], W_gate[d,F], b_gate[F], W_dec, b_dec

For the formulas see Router, and Kron and VaEase in `steerserve.sae.encoders`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.encoders import Kron, VaEase
from steerserve.sae.files import inside, map_safetensors, take
from steerserve.sae.hook import Hook
from steerserve.sae.router import Router
from steerserve.sae.sae import Sae

from .common import checked, constant, expect_only, matrix_shape, rectifier, stored, stream
from .fields import Fields

__all__ = ["ARCHITECTURES", "CONFIG", "WEIGHTS", "is_trained", "open_trained"]

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"


@dataclass(frozen=True)
class _File:
    """The two files of an SAE, each value taken with its kind or shape checked."""

    path: Path
    tensors: Mapping[str, Tensor]
    fields: Fields
    d_in: int
    d_sae: int

    def matrix(self, name: str, rows: int) -> Tensor:
        """A stored [d, rows] as [rows, d], a view of the mapped file."""
        return take(self.tensors, name, (self.d_in, rows), self.path).T

    def vector(self, name: str, length: int) -> Tensor:
        """[length], likewise."""
        return take(self.tensors, name, (length,), self.path)

    def top_k(self) -> int:
        """k. Raises: CheckpointError if it is more than F."""
        k = self.fields.positive("k")
        if k > self.d_sae:
            raise CheckpointError(f"expected `k` <= d_sae {self.d_sae}, got {k}", path=self.fields.path)
        return k


def is_trained(folder: Path) -> bool:
    """Whether these files lie in a folder, of one of these architectures.

    Raises: CheckpointError if the config beside the weights holds no JSON object.
    """
    if not ((folder / CONFIG).exists() and (folder / WEIGHTS).exists()):
        return False
    return Fields.read(inside(folder, CONFIG)).values.get("architecture") in ARCHITECTURES


def open_trained(folder: Path) -> Sae:
    """Open one of them.

    Args: folder: an existing folder, with symlinks resolved.
    Raises: CheckpointError if a file is damaged, or tensors and config contradict each other.
    """
    fields = Fields.read(inside(folder, CONFIG))
    path = inside(folder, WEIGHTS)
    tensors, _ = map_safetensors(path)
    architecture = fields.one_of("architecture", tuple(ARCHITECTURES))
    d_sae, d_in = matrix_shape(tensors, "W_dec", path)
    fields.equal("d_in", d_in, WEIGHTS)
    fields.equal("d_sae", d_sae, WEIGHTS)
    build, names = _BUILD[architecture]
    expect_only(tensors, {"W_dec", "b_dec", *names}, f"an SAE of architecture {architecture}", path)
    hook, refusal = _hook(fields)
    sae = build(_File(path, tensors, fields, d_in, d_sae))
    return checked(replace(sae, architecture=architecture, hook=hook, refusal=refusal), folder, tensors)


def _hook(fields: Fields) -> tuple[Hook | None, str | None]:
    name = fields.section("metadata").text("hook_name")
    return (None, None) if name is None else stream(name)


def _sae(file: _File, encoder: Tensor, why: str) -> Sae:
    return Sae(
        architecture="",
        d_in=file.d_in,
        d_sae=file.d_sae,
        hook=None,
        path=file.path,
        stored=stored(
            encoder,
            file.tensors["W_dec"],
            constant(0.0, file.d_sae),
            file.vector("b_dec", file.d_in),
            subtracts_b_dec=True,
        ),
        activation=rectifier(file.d_sae),
        needs_resident=why,
    )


def _no_rows(file: _File) -> Tensor:
    """[F, d] of zeros, in the memory of one: what stands for encoder rows that do not exist."""
    return torch.zeros((), dtype=file.tensors["W_dec"].dtype).expand(file.d_sae, file.d_in)


def _switch(file: _File) -> Sae:
    experts, k = file.fields.positive("experts"), file.top_k()
    if file.d_sae % experts:
        message = f"expected `experts` to divide {file.d_sae} features, got {experts}"
        raise CheckpointError(message, path=file.fields.path)
    weight = take(file.tensors, "W_router", (experts, file.d_in), file.path).float()
    router = Router(weight, file.vector("b_router", file.d_in).float(), heaviside=False)
    why = "its router chooses an expert for each token, whose exact top-k compares all its features"
    sae = _sae(file, file.matrix("W_enc", file.d_sae), why)
    return replace(sae, top_k=k, router=router)


def _kron(file: _File) -> Sae:
    heads, base, extension = (file.fields.positive(key) for key in ("heads", "base", "extension"))
    if heads * base * extension != file.d_sae:
        message = f"expected `heads`·`base`·`extension` to be {file.d_sae}, got {heads}·{base}·{extension}"
        raise CheckpointError(message, path=file.fields.path)
    encoder = Kron(
        left=file.matrix("W_left", heads * base),
        left_bias=file.vector("b_left", heads * base),
        right=file.matrix("W_right", heads * extension),
        right_bias=file.vector("b_right", heads * extension),
        heads=heads,
        top_k=file.top_k(),
    )
    why = "its features share factors, and its exact top-k compares all features of a token"
    return replace(_sae(file, _no_rows(file), why), top_k=encoder.top_k, encoder=encoder)


def _vaease(file: _File) -> Sae:
    encoder = VaEase(
        weight=file.matrix("W_enc", file.d_sae),
        bias=file.vector("b_enc", file.d_sae),
        gate=file.matrix("W_gate", file.d_sae),
        gate_bias=file.vector("b_gate", file.d_sae),
    )
    why = "each of its features has a gate beside its mean, which no single encoder row gives"
    return replace(_sae(file, _no_rows(file), why), encoder=encoder)


_BUILD: dict[str, tuple[Callable[[_File], Sae], tuple[str, ...]]] = {
    "kron": (_kron, ("W_left", "W_right", "b_left", "b_right")),
    "switch": (_switch, ("W_enc", "W_router", "b_router")),
    "vaease": (_vaease, ("W_enc", "W_gate", "b_enc", "b_gate")),
}
ARCHITECTURES = tuple(_BUILD)
