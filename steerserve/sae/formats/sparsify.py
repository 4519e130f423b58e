"""sparsify's folders: `cfg.json` and `sae.safetensors` in a folder named after the hook point.

    f = top-k(relu(W·(x − b_dec) + b)), or the largest of each of k groups;  x̂ = f @ W_dec + b_dec

The folder's name says where (`layers.10`: what decoder layer 10 puts out). Transcoders (`transcode`, which do
not subtract b_dec) and skip connections (`W_skip`) are not served.

Source: github.com/EleutherAI/sparsify, `sparse_coder.py`, and Gao et al. 2024, arXiv:2406.04093.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from steerserve.errors import CheckpointError
from steerserve.sae.encoders import Linear
from steerserve.sae.encoders.group_max import GroupMax
from steerserve.sae.files import inside, map_safetensors, take
from steerserve.sae.hook import Hook
from steerserve.sae.sae import Sae

from .common import TOP_K, checked, expect_only, matrix_shape, rectifier, stored, stream
from .fields import Fields

__all__ = ["CONFIG", "WEIGHTS", "open_sparsify"]

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"

_TENSORS = {"W_dec", "W_skip", "b_dec", "encoder.bias", "encoder.weight"}
_PLACE = re.compile(r"(?:\w+\.)*(?:layers|h|blocks)[._]\d+(?:\..+)?|(?:\w+\.)*(?:embed_tokens|wte)")


def open_sparsify(folder: Path) -> Sae:
    """Open one SAE of sparsify.

    Args: folder: an existing folder, with symlinks resolved.
    Raises: CheckpointError if a file is damaged or contradicts `cfg.json`.
    """
    path = inside(folder, WEIGHTS)
    tensors, _ = map_safetensors(path)
    expect_only(tensors, _TENSORS, "an SAE of sparsify", path)
    d_sae, d_in = matrix_shape(tensors, "W_dec", path)
    config = Fields.read(inside(folder, CONFIG))
    _check_sizes(config, d_sae, d_in)
    k = config.positive("k")
    if k > d_sae:
        raise CheckpointError(f"expected `k` <= {d_sae} features, got {k}", path=config.path)
    hook, elsewhere = _place(folder)
    transcode = config.flag("transcode", default=False)
    sae = Sae(
        architecture="topk",
        d_in=d_in,
        d_sae=d_sae,
        hook=hook,
        path=path,
        stored=stored(
            take(tensors, "encoder.weight", (d_sae, d_in), path),
            tensors["W_dec"],
            take(tensors, "encoder.bias", (d_sae,), path),
            take(tensors, "b_dec", (d_in,), path),
            subtracts_b_dec=not transcode,
        ),
        activation=rectifier(d_sae),
        refusal=_refusal(config, "W_skip" in tensors) or elsewhere,
        needs_resident=TOP_K,
        top_k=k,
    )
    if config.one_of("activation", ("topk", "groupmax"), default="topk") == "groupmax":
        sae = _group_max(sae, k, config)
    return checked(sae, folder, tensors)


def _group_max(sae: Sae, k: int, config: Fields) -> Sae:
    if sae.d_sae % k:
        message = f"expected `k` groups to divide {sae.d_sae} features, got {k}"
        raise CheckpointError(message, path=config.path)
    weights = sae.stored
    linear = Linear(weights.encoder, weights.bias, weights.encoder_scale, sae.activation, None)
    why = "of each group of its features only the largest is kept"
    encoder = GroupMax(linear, k)
    return replace(sae, architecture="groupmax", top_k=None, encoder=encoder, needs_resident=why)


def _check_sizes(config: Fields, d_sae: int, d_in: int) -> None:
    config.equal("d_in", d_in, WEIGHTS)
    latents = config.whole("num_latents") if config.values.get("num_latents") is not None else 0
    said = latents or d_in * config.positive("expansion_factor")
    if said != d_sae:
        message = f"expected {d_sae} features as in `{WEIGHTS}`, got {said} by `num_latents`"
        raise CheckpointError(f"{message} or `expansion_factor`", path=config.path)


def _refusal(config: Fields, skip: bool) -> str | None:
    if config.flag("transcode", default=False):
        return "it is a transcoder, whose output is not what it reads: not served"
    if skip or config.flag("skip_connection", default=False):
        return "it has a skip connection (`W_skip`), which is no SAE's: not served"
    if config.flag("signed", default=False):
        return "its top-k is of magnitudes (`signed`), so that features are negative too: not served"
    return None


def _place(folder: Path) -> tuple[Hook | None, str | None]:
    if not _PLACE.fullmatch(folder.name):
        return None, None
    return stream(re.sub(r"(layers|h|blocks)_(\d)", r"\1.\2", folder.name))
