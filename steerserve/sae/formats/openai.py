"""OpenAI's autoencoders: one file `N.pt` for layer N, in a folder that names the place.

    y = (x − μ)/(σ + 1e-5) for TopK, else x;  f = act(W·(y − pre_bias) + latent_bias)
    x̂ = (D·f + pre_bias)·σ + μ for TopK, without σ and μ otherwise; σ unbiased

This layer norm is SAELens' own to the letter (Normalisation "layer_norm"). The name of the activation and its
k lie in the file: `activation`, and `activation_state_dict` with `k` and `postact_fn`.

Source: github.com/openai/sparse_autoencoder, `model.py` and `paths.py`; Gao et al. 2024, arXiv:2406.04093.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.files import take
from steerserve.sae.hook import Hook
from steerserve.sae.sae import Sae
from steerserve.sae.torch_file import TorchFile

from .common import TOP_K, checked, expect_only, matrix_shape, rectifier, stored
from .fields import Fields

__all__ = ["is_openai", "open_openai"]

# Buffers of its trainer; no activation depends on them.
_STATISTICS = {"latents_activation_frequency", "latents_mean_square", "stats_last_nonzero"}
_TENSORS = {"decoder.weight", "encoder.weight", "latent_bias", "pre_bias"} | _STATISTICS
_NEEDS_RESIDENT = f"{TOP_K}, and its layer norm depends on each token and does not fold"
_PLACE = re.compile(
    r"(resid_post_mlp|resid_post_attn|resid_delta_mlp|resid_delta_attn|mlp_post_act)(?:_v\d.*)?"
)
_LAYER = re.compile(r"(\d{1,4})\.pth?")


def is_openai(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of such a file."""
    return {"latent_bias", "pre_bias"} <= set(tensors)


def open_openai(file: TorchFile) -> Sae:
    """Open one autoencoder of OpenAI.

    Raises: CheckpointError if a tensor is missing or misshapen, or the activation is none of theirs.
    """
    path, tensors = file.path, file.tensors
    expect_only(tensors, _TENSORS, "an autoencoder of OpenAI", path)
    d_sae, d_in = matrix_shape(tensors, "encoder.weight", path)
    fields = Fields(path, file.values)
    top_k, refusal = _activation(fields, d_sae)
    hook, elsewhere = _place(path)
    sae = Sae(
        architecture="topk" if fields.values.get("activation") == "TopK" else "standard",
        d_in=d_in,
        d_sae=d_sae,
        hook=hook,
        path=path,
        stored=stored(
            tensors["encoder.weight"],
            take(tensors, "decoder.weight", (d_in, d_sae), path).T,
            take(tensors, "latent_bias", (d_sae,), path),
            take(tensors, "pre_bias", (d_in,), path),
            subtracts_b_dec=True,
        ),
        activation=rectifier(d_sae),
        refusal=refusal or elsewhere,
        needs_resident=None if top_k is None else _NEEDS_RESIDENT,
        top_k=top_k,
        normalisation="none" if top_k is None else "layer_norm",
    )
    return checked(sae, path.parent, {k: v for k, v in tensors.items() if k not in _STATISTICS})


def _activation(fields: Fields, d_sae: int) -> tuple[int | None, str | None]:
    """k, and why it cannot be served."""
    name = fields.one_of("activation", ("ReLU", "Identity", "TopK"), default="ReLU")
    if name == "Identity":
        return None, "its activation Identity makes no feature sparse: not served"
    if name == "ReLU":
        return None, None
    k = fields.positive("activation_state_dict.k")
    if k > d_sae:
        raise CheckpointError(f"expected `k` <= {d_sae} features, got {k}", path=fields.path)
    after = fields.one_of("activation_state_dict.postact_fn", ("ReLU", "Identity"), default="ReLU")
    return k, None if after == "ReLU" else "its top-k is not rectified (`postact_fn` Identity): not served"


def _place(path: Path) -> tuple[Hook | None, str | None]:
    layer = _LAYER.fullmatch(path.name)
    sites = [match[1] for part in path.parent.parts if (match := _PLACE.fullmatch(part))]
    if sites and sites[-1] != "resid_post_mlp":
        return None, f"`{sites[-1]}` is not the residual stream between layers: not served"
    return (Hook(int(layer[1]), "resid_post") if sites and layer else None), None
