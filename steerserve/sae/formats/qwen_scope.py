"""Qwen-Scope: one file `layerN.sae.pt` for layer N, in a folder whose name holds what the file does not.

    f = top-k(relu(W_enc·x + b_enc)),  x̂ = W_dec·f + b_dec     with W_enc [F, d] and W_dec [d, F]

k stands in the name alone, as in `SAE-Res-Qwen3-8B-Base-W64K-L0_50`; it is read from the nearest name at or
above the file that has one, and the width `W64K` is compared. b_dec is not subtracted.
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

__all__ = ["is_qwen_scope", "open_qwen_scope"]

_TENSORS = {"W_dec", "W_enc", "b_dec", "b_enc"}
_LAYER = re.compile(r"layer(\d{1,4})\.sae\.pth?")
_K = re.compile(r"L0_(\d{1,9})(?!\d)")
_WIDTH = re.compile(r"-W(\d{1,9})K(?=-|$)")
_SITE = re.compile(r"SAE-(\w+)-")


def is_qwen_scope(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of such a file: no threshold, and nothing that is not listed above."""
    return set(tensors) == _TENSORS


def open_qwen_scope(file: TorchFile) -> Sae:
    """Open one SAE of Qwen-Scope.

    Raises: CheckpointError if a tensor is misshapen, or the name contradicts the file.
    """
    path, tensors = file.path, file.tensors
    expect_only(tensors, _TENSORS, "an SAE of Qwen-Scope", path)
    d_sae, d_in = matrix_shape(tensors, "W_enc", path)
    name = next((part for part in reversed(path.parts) if _K.search(part)), "")
    k = _k(name, path, d_sae)
    hook, elsewhere = _place(name, path)
    unknown = "expected k in a name above the file (`…-L0_50`), for nothing else says it: not served"
    sae = Sae(
        architecture="topk",
        d_in=d_in,
        d_sae=d_sae,
        hook=hook,
        path=path,
        stored=stored(
            tensors["W_enc"],
            take(tensors, "W_dec", (d_in, d_sae), path).T,
            take(tensors, "b_enc", (d_sae,), path),
            take(tensors, "b_dec", (d_in,), path),
            subtracts_b_dec=False,
        ),
        activation=rectifier(d_sae),
        refusal=elsewhere if k is not None else unknown,
        needs_resident=TOP_K,
        top_k=k,
    )
    return checked(sae, path.parent, tensors)


def _k(name: str, path: Path, d_sae: int) -> int | None:
    """The name's k. Raises: CheckpointError if its k or width cannot be this file's."""
    said, width = _K.search(name), _WIDTH.search(name)
    if said is None:
        return None
    if width is not None and int(width[1]) * 1024 != d_sae:
        message = f"expected {int(width[1]) * 1024} features as its name `{name}` says, got {d_sae}"
        raise CheckpointError(message, path=path, tensor="W_enc")
    if not 1 <= int(said[1]) <= d_sae:
        raise CheckpointError(f"expected 1 <= k <= {d_sae} in its name `{name}`, got {said[1]}", path=path)
    return int(said[1])


def _place(name: str, path: Path) -> tuple[Hook | None, str | None]:
    site, layer = _SITE.search(name), _LAYER.fullmatch(path.name)
    if site is not None and site[1] != "Res":
        return None, f"`SAE-{site[1]}` is not trained on the residual stream: not served"
    return (Hook(int(layer[1]), "resid_post") if layer else None), None
