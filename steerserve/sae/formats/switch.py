"""Switch SAEs as their authors' trainer saves them: `config.json` and `ae.pt`.

    p = softmax(W_router·(x − b_router)),  i = argmax p
    f = top-k(relu(W_enc·(x − b_dec)))     of the features of expert i alone; all others are 0
    x̂ = p_i·(f @ decoder) + b_dec

Expert i owns the features [i·F/E, (i+1)·F/E). With `heaviside`, 1 stands in place of p_i.

Source: Mudide et al. 2024, arXiv:2410.08201, section 3, and github.com/amudide/switch_sae,
`dictionary_learning/trainers/switch.py`. That code calls p_i·f the features; here they are the paper's f, the
same numbers whatever the router's confidence, and p_i is the token's gain (`Encoded.gain`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.files import inside, read_json, take
from steerserve.sae.hook import Hook
from steerserve.sae.router import Router
from steerserve.sae.sae import Sae, Stored
from steerserve.sae.torch_file import map_torch

from .common import checked, rectifier

__all__ = ["CONFIG", "WEIGHTS", "is_switch", "open_switch"]

CONFIG = "config.json"
WEIGHTS = "ae.pt"

_TENSORS = {"b_dec", "b_router", "decoder", "encoder.weight", "router.weight"}
_NEEDS_RESIDENT = "its router chooses an expert for each token, whose exact top-k compares all its features"
_STREAM = re.compile(r"(resid_pre|resid_post)(?:_layer_\d+)?")


@dataclass(frozen=True)
class _Config:
    """What of `config.json` decides how the SAE computes; see Router and Sae."""

    k: int
    experts: int
    heaviside: bool
    hook: Hook | None
    refusal: str | None


def is_switch(folder: Path) -> bool:
    """Whether the folder's `ae.pt` holds a router.

    Raises: CheckpointError if there is such a file and it is damaged or untrusted.
    """
    return (folder / WEIGHTS).exists() and "router.weight" in map_torch(inside(folder, WEIGHTS))


def open_switch(folder: Path) -> Sae:
    """Open one Switch SAE.

    Args: folder: an existing folder, with symlinks resolved.
    Raises: CheckpointError if a file is damaged, or tensors and config contradict each other.
    """
    path = inside(folder, WEIGHTS)
    tensors = map_torch(path)
    for name in sorted(set(tensors) - _TENSORS):
        raise CheckpointError("expected no such tensor in a Switch SAE", path=path, tensor=name)
    if "decoder" not in tensors or tensors["decoder"].ndim != 2:
        raise CheckpointError("expected a matrix [d_sae, d_in]", path=path, tensor="decoder")
    d_sae, d_in = tensors["decoder"].shape
    config = _read_config(inside(folder, CONFIG), d_sae, d_in)
    router = Router(
        take(tensors, "router.weight", (config.experts, d_in), path).float(),
        take(tensors, "b_router", (d_in,), path).float(),
        config.heaviside,
    )
    sae = Sae(
        architecture="switch",
        d_in=d_in,
        d_sae=d_sae,
        hook=config.hook,
        path=path,
        stored=_stored(tensors, d_sae, d_in, path),
        activation=rectifier(d_sae),
        refusal=config.refusal,
        needs_resident=_NEEDS_RESIDENT,
        top_k=config.k,
        router=router,
    )
    return checked(sae, folder, tensors)


def _stored(tensors: Mapping[str, Tensor], d_sae: int, d_in: int, path: Path) -> Stored:
    b_dec = take(tensors, "b_dec", (d_in,), path).float()
    ones = torch.ones(d_sae)
    return Stored(
        encoder=take(tensors, "encoder.weight", (d_sae, d_in), path),
        decoder=tensors["decoder"],
        bias=torch.zeros(d_sae),
        pre_bias=b_dec,
        b_dec=b_dec,
        encoder_scale=ones,
        decoder_scale=ones,
        input_scale=1.0,
    )


def _read_config(path: Path, d_sae: int, d_in: int) -> _Config:
    raw = read_json(path)
    values = raw.get("trainer", raw)
    if not isinstance(values, dict):
        raise CheckpointError("expected `trainer` to be an object", path=path)
    for key, size in (("dict_size", d_sae), ("activation_dim", d_in)):
        if values.get(key, size) != size:
            message = f"expected `{key}` {size} as in `{WEIGHTS}`, got {values[key]!r}"
            raise CheckpointError(message, path=path)
    k, experts = _whole(values, "k", path), _whole(values, "experts", path)
    if not (1 <= k <= d_sae and experts >= 1 and d_sae % experts == 0):
        message = f"expected `experts` to divide, and `k` not to exceed, {d_sae} features"
        raise CheckpointError(f"{message}, got {experts} and {k}", path=path)
    heaviside = values.get("heaviside", False)
    if not isinstance(heaviside, bool):
        raise CheckpointError(f"expected true or false as `heaviside`, got {heaviside!r}", path=path)
    return _Config(k, experts, heaviside, *_hook(values, path))


def _hook(values: Mapping[str, Any], path: Path) -> tuple[Hook | None, str | None]:
    """The trainer reads what decoder layer `layer` puts out, unless `submodule_name` says otherwise."""
    name = values.get("submodule_name") or "resid_post"
    match = _STREAM.fullmatch(str(name))
    if match is None:
        return None, f"it reads `{name}`, not the residual stream: not served"
    if values.get("layer") is None:
        return None, None
    layer = _whole(values, "layer", path)
    return Hook(layer, "resid_pre" if match[1] == "resid_pre" else "resid_post"), None


def _whole(values: Mapping[str, Any], key: str, path: Path) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"expected a whole number as `{key}`, got {value!r}", path=path)
    return value
