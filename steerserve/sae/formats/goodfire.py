"""Goodfire's SAEs: one `.pt` or `.pth` of two linear layers, with a ReLU between them.

    f = relu(W_e·x + b_e),  x̂ = W_d·f + b_d

The decoder's bias is not subtracted. The layer stands in the name: `Llama-3.1-8B-Instruct-SAE-l19.pth`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from steerserve.sae.files import take
from steerserve.sae.hook import Hook
from steerserve.sae.sae import Sae
from steerserve.sae.torch_file import TorchFile

from .common import checked, expect_only, matrix_shape, rectifier, stored

__all__ = ["is_goodfire", "open_goodfire"]

_TENSORS = {"decoder_linear.bias", "decoder_linear.weight", "encoder_linear.bias", "encoder_linear.weight"}
_LAYER = re.compile(r"-SAE-l(\d{1,4})(?:\.pth?)?")


def is_goodfire(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of such a file."""
    return "encoder_linear.weight" in tensors


def open_goodfire(file: TorchFile) -> Sae:
    """Open one SAE of Goodfire.

    Raises: CheckpointError if a tensor is missing or misshapen.
    """
    path, tensors = file.path, file.tensors
    expect_only(tensors, _TENSORS, "an SAE of Goodfire", path)
    d_sae, d_in = matrix_shape(tensors, "encoder_linear.weight", path)
    sae = Sae(
        architecture="standard",
        d_in=d_in,
        d_sae=d_sae,
        hook=_place(path),
        path=path,
        stored=stored(
            tensors["encoder_linear.weight"],
            take(tensors, "decoder_linear.weight", (d_in, d_sae), path).T,
            take(tensors, "encoder_linear.bias", (d_sae,), path),
            take(tensors, "decoder_linear.bias", (d_in,), path),
            subtracts_b_dec=False,
        ),
        activation=rectifier(d_sae),
    )
    return checked(sae, path.parent, tensors)


def _place(path: Path) -> Hook | None:
    for part in reversed(path.parts):
        if part.count("-SAE-l") == 1 and (match := _LAYER.search(part)):
            return Hook(int(match[1]), "resid_post")
    return None
