"""Gemma Scope 1: a bare `params.npz` whose meaning lies in its path.

JumpReLU without b_dec subtraction (Lieberum et al. 2024, arXiv:2408.05147); layer and site are read from
`gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82`.
"""

from __future__ import annotations

import re
from pathlib import Path

from steerserve.errors import CheckpointError
from steerserve.sae.files import inside, map_npz, take
from steerserve.sae.hook import Hook
from steerserve.sae.sae import Sae, Stored

from .common import checked, constant, jump_relu

__all__ = ["WEIGHTS", "open_gemma_scope"]

WEIGHTS = "params.npz"

_TENSORS = {"W_dec", "W_enc", "b_dec", "b_enc", "threshold"}
_OTHER_SITE = re.compile(r"gemma-scope-.*-(att|mlp|transcoders)|embedding")


def open_gemma_scope(folder: Path) -> Sae:
    """Open one Gemma Scope 1 SAE.

    Args: folder: an existing folder, with symlinks resolved.
    Raises: CheckpointError if the archive is damaged, compressed, or not of this layout.
    """
    path = inside(folder, WEIGHTS)
    tensors = map_npz(path)
    for name in sorted(set(tensors) - _TENSORS):
        raise CheckpointError("expected no such tensor in a Gemma Scope SAE", path=path, tensor=name)
    if "W_dec" not in tensors or tensors["W_dec"].ndim != 2:
        raise CheckpointError("expected a matrix [d_sae, d_in]", path=path, tensor="W_dec")
    d_sae, d_in = tensors["W_dec"].shape
    b_dec = take(tensors, "b_dec", (d_in,), path).float()
    ones = constant(1.0, d_sae)
    stored = Stored(
        encoder=take(tensors, "W_enc", (d_in, d_sae), path).T,
        decoder=tensors["W_dec"],
        bias=take(tensors, "b_enc", (d_sae,), path),
        pre_bias=None,
        b_dec=b_dec,
        encoder_scale=ones,
        decoder_scale=ones,
        input_scale=1.0,
    )
    activation = jump_relu(take(tensors, "threshold", (d_sae,), path))
    hook, refusal = _place(folder)
    sae = Sae("jumprelu", d_in, d_sae, hook, path, stored, activation, refusal=refusal)
    return checked(sae, folder, tensors)


def _place(folder: Path) -> tuple[Hook | None, str | None]:
    for part in reversed(folder.parts):
        if _OTHER_SITE.fullmatch(part):
            return None, f"`{part}` is not trained on the residual stream between layers: not served"
    layers = [match[1] for part in folder.parts if (match := re.fullmatch(r"layer_(\d+)", part))]
    return (Hook(int(layers[-1]), "resid_post") if layers else None), None
