"""Gemma Scope 2: `config.json` and `params.safetensors`, JumpReLU without b_dec subtraction.

    f = max(z, 0) where z = x @ w_enc + b_enc > θ,  x̂ = f @ w_dec + b_dec

The place is `hf_hook_point_in` (`model.layers.17.output`), or where there is no config the folder's path
(`resid_post/layer_17_width_16k_l0_medium`). Transcoders, and SAEs with an affine skip connection, lie in the
same layout and are not served: their reconstruction is not of what they read.
"""

from __future__ import annotations

import re
from pathlib import Path

from steerserve.sae.files import inside, map_safetensors, take
from steerserve.sae.hook import Hook
from steerserve.sae.sae import Sae

from .common import checked, expect_only, jump_relu, matrix_shape, stored, stream
from .fields import Fields

__all__ = ["CONFIG", "WEIGHTS", "open_gemma_scope_2"]

CONFIG = "config.json"
WEIGHTS = "params.safetensors"

_SKIP = "affine_skip_connection"
_TENSORS = {"b_dec", "b_enc", "threshold", "w_dec", "w_enc", _SKIP}
_SITE = re.compile(r"(resid_post|attn_out|mlp_out|transcoder|clt)(?:_\w+)?")
_LAYER = re.compile(r"layer_(\d{1,4})(?:_\w+)?")


def open_gemma_scope_2(folder: Path) -> Sae:
    """Open one Gemma Scope 2 SAE.

    Args: folder: an existing folder, with symlinks resolved.
    Raises: CheckpointError if a file is damaged or contradicts `config.json`.
    """
    path = inside(folder, WEIGHTS)
    tensors, _ = map_safetensors(path)
    expect_only(tensors, _TENSORS, "a Gemma Scope 2 SAE", path)
    d_sae, d_in = matrix_shape(tensors, "w_dec", path)
    hook, refusal = _place(folder, d_sae)
    if _SKIP in tensors:
        refusal = f"it has a skip connection (`{_SKIP}`), which is no SAE's: not served"
    sae = Sae(
        architecture="jumprelu",
        d_in=d_in,
        d_sae=d_sae,
        hook=hook,
        path=path,
        stored=stored(
            take(tensors, "w_enc", (d_in, d_sae), path).T,
            tensors["w_dec"],
            take(tensors, "b_enc", (d_sae,), path),
            take(tensors, "b_dec", (d_in,), path),
            subtracts_b_dec=False,
        ),
        activation=jump_relu(take(tensors, "threshold", (d_sae,), path)),
        refusal=refusal,
    )
    return checked(sae, folder, tensors)


def _place(folder: Path, d_sae: int) -> tuple[Hook | None, str | None]:
    if not (folder / CONFIG).exists():
        return _place_in_path(folder)
    config = Fields.read(inside(folder, CONFIG))
    config.one_of("architecture", ("jump_relu",))
    config.equal("width", d_sae, WEIGHTS)
    source, target = config.text("hf_hook_point_in"), config.text("hf_hook_point_out")
    if (target or source) != source or config.text("type") in ("transcoder", "clt", "crosscoder"):
        return None, f"it is a transcoder from `{source}` to `{target}`: not served"
    if config.flag("affine_connection", default=False):
        return None, "it has an affine skip connection, which is no SAE's: not served"
    return _place_in_path(folder) if source is None else stream(source.removesuffix(".output"))


def _place_in_path(folder: Path) -> tuple[Hook | None, str | None]:
    sites = [match[1] for part in folder.parts if (match := _SITE.fullmatch(part))]
    layers = [match[1] for part in folder.parts if (match := _LAYER.fullmatch(part))]
    if sites and sites[-1] != "resid_post":
        return None, f"`{sites[-1]}` is not the residual stream: not served"
    return (Hook(int(layers[-1]), "resid_post") if sites and layers else None), None
