"""Gemma Scope 1: a bare `params.npz` whose meaning lies in its path.

JumpReLU without b_dec subtraction (Lieberum et al. 2024, arXiv:2408.05147); layer and site are read from
`gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82`.
"""

from __future__ import annotations

import re
from pathlib import Path

from steerserve.sae.files import inside, map_npz, take
from steerserve.sae.hook import Hook
from steerserve.sae.sae import Sae

from .common import checked, expect_only, jump_relu, matrix_shape, stored

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
    expect_only(tensors, _TENSORS, "a Gemma Scope SAE", path)
    d_sae, d_in = matrix_shape(tensors, "W_dec", path)
    hook, refusal = _place(folder)
    sae = Sae(
        architecture="jumprelu",
        d_in=d_in,
        d_sae=d_sae,
        hook=hook,
        path=path,
        stored=stored(
            take(tensors, "W_enc", (d_in, d_sae), path).T,
            tensors["W_dec"],
            take(tensors, "b_enc", (d_sae,), path),
            take(tensors, "b_dec", (d_in,), path),
            subtracts_b_dec=False,
        ),
        activation=jump_relu(take(tensors, "threshold", (d_sae,), path)),
        refusal=refusal,
    )
    return checked(sae, folder, tensors)


def _place(folder: Path) -> tuple[Hook | None, str | None]:
    for part in reversed(folder.parts):
        if _OTHER_SITE.fullmatch(part):
            return None, f"`{part}` is not trained on the residual stream between layers: not served"
    layers = [match[1] for part in folder.parts if (match := re.fullmatch(r"layer_(\d+)", part))]
    return (Hook(int(layers[-1]), "resid_post") if layers else None), None
