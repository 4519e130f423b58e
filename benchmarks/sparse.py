"""SAEs of any size that take next to no disk: the weights of all but a few features are holes in the file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["WEIGHTS", "feature_values", "write_sparse_sae"]

WEIGHTS = "sae_weights.safetensors"
_SIZE = 2


def feature_values(feature: int, d_in: int) -> tuple[Tensor, Tensor]:
    """The encoder row and the decoder row of a written feature, [d_in] bfloat16 each."""
    generator = torch.Generator().manual_seed(feature)
    encoder, decoder = torch.randn(2, d_in, generator=generator).to(torch.bfloat16)
    return encoder, decoder


def write_sparse_sae(folder: Path, d_sae: int, d_in: int, features: Sequence[int]) -> Path:
    """A JumpReLU SAE in SAELens' layout, bfloat16, zero everywhere but in the named features.

    Each of them takes up to d_in blocks of disk, for its encoder column has every value in another one.
    """
    shapes = {"W_dec": (d_sae, d_in), "W_enc": (d_in, d_sae), "b_dec": (d_in,), "b_enc": (d_sae,)}
    shapes["threshold"] = (d_sae,)
    header: dict[str, object] = {}
    at, starts = 0, {}
    for name, shape in shapes.items():
        starts[name], end = at, at + _SIZE * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        first = file.tell()
        file.truncate(first + at)
        file.flush()
        values = {feature: feature_values(feature, d_in) for feature in sorted(features)}
        for feature, (_, decoder) in values.items():
            os.pwrite(file.fileno(), _bytes(decoder), first + starts["W_dec"] + feature * d_in * _SIZE)
        columns = {feature: _bytes(encoder) for feature, (encoder, _) in values.items()}
        for i in range(d_in):
            row = first + starts["W_enc"] + i * d_sae * _SIZE
            for feature, column in columns.items():
                os.pwrite(file.fileno(), column[i * _SIZE : (i + 1) * _SIZE], row + feature * _SIZE)
        os.fsync(file.fileno())
    config = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "bfloat16",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.1.hook_resid_post", "sae_lens_version": "6.54.12"},
    }
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _bytes(values: Tensor) -> bytes:
    return values.view(torch.int16).numpy().tobytes()
