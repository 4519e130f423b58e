"""An SAE's decoder against features that are known, because they were planted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.files import check_finite, map_safetensors

__all__ = ["Recovery", "judge_dictionary", "read_features"]


@dataclass(frozen=True)
class Recovery:
    """Attributes:
    mmcs: mean over known features of the best cosine with any latent; signs count.
    mcc: mean |cosine| of the pairs of the best one-to-one matching, min(F, K) of them.
    uniqueness: known features that are the best match (by |cosine|) of some latent, over F.
    """

    mmcs: float
    mcc: float
    uniqueness: float


def judge_dictionary(decoder: Tensor, known: Tensor) -> Recovery:
    """Compare latents with known features by the cosine of their directions.

    Args: decoder: [F, d]. known: [K, d], no row of zeros.
    Source: MMCS: Sharkey et al. 2022. MCC: arXiv:2505.20254, by the Hungarian algorithm; this and the
        uniqueness as in SAELens' `synthetic` package, so that the numbers compare.
    """
    from scipy.optimize import linear_sum_assignment

    cosine = _unit(decoder) @ _unit(known).T
    size = cosine.abs()
    rows, columns = linear_sum_assignment(size.numpy(), maximize=True)
    return Recovery(
        mmcs=float(cosine.amax(0).mean()),
        mcc=float(size[torch.from_numpy(rows), torch.from_numpy(columns)].mean()),
        uniqueness=len(size.argmax(1).unique()) / len(decoder),
    )


def read_features(path: Path, d_in: int) -> Tensor:
    """Known features from a safetensors file with one tensor `features` [K, d_in].

    Raises: CheckpointError if the file holds anything else, a NaN, or a feature of length zero.
    """
    tensors, _ = map_safetensors(path)
    check_finite(tensors, path)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    features = tensors.get("features")
    if features is None or features.ndim != 2 or features.shape[1] != d_in:
        raise CheckpointError(f"expected one matrix `features` [K, {d_in}], got {shapes}", path=path)
    features = features.float()
    if not bool((features.norm(dim=1) > 0).all()):
        raise CheckpointError("expected directions, got a row of zeros", path=path, tensor="features")
    return features


def _unit(rows: Tensor) -> Tensor:
    wide = rows.detach().cpu().double()
    unit: Tensor = wide / wide.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return unit
