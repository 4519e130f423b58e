"""Named directions (DiffMean, a probe, a control vector): served as features with identity activation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.hookpoint import Site

from .files import check_finite, inside, map_safetensors, write_safetensors
from .hook import Hook
from .rows import FeatureRows

__all__ = ["Direction", "read_direction", "write_direction"]

_SITES: dict[str, Site] = {"resid_post": "resid_post", "resid_pre": "resid_pre"}


@dataclass(frozen=True)
class Direction:
    """A unit vector of the residual stream.

    Attributes:
        name: as requests call it.
        vector: [d] float32, of unit norm.
        hook: where it was found and is applied, or None where its file does not say.
        statistics: numbers about the projection x·v, for example `max_activation`, in the model's own scale.
    """

    name: str
    vector: Tensor
    hook: Hook | None
    statistics: Mapping[str, float] = field(default_factory=dict)

    def rows(self) -> FeatureRows:
        """One row whose activation is the projection itself: no threshold, no rectifier."""
        vector, zero = self.vector.unsqueeze(0), torch.zeros(1)
        no_floor = torch.full((1,), -torch.inf)
        return FeatureRows(vector, zero, no_floor, torch.ones(1), zero, no_floor, vector)


def read_direction(path: Path | str, name: str | None = None) -> Direction:
    """Read a safetensors file with one tensor `direction` [d] and metadata `layer`, `hook`, `statistics`.

    Args: path: the file. name: what to call it; the file's stem by default.
    Raises: CheckpointError if the file is damaged, or the vector is zero, not finite or not one-dimensional.
    """
    path = Path(path)
    path = inside(path.parent, path.name)
    tensors, metadata = map_safetensors(path)
    check_finite(tensors, path)
    if set(tensors) != {"direction"} or tensors["direction"].ndim != 1:
        shapes = {key: list(value.shape) for key, value in tensors.items()}
        raise CheckpointError(f"expected one vector `direction` [d], got {shapes}", path=path)
    vector = tensors["direction"].double()
    norm = vector.norm()
    if norm == 0:
        raise CheckpointError("expected a direction, got the zero vector", path=path, tensor="direction")
    unit = (vector / norm).float()
    return Direction(name or path.stem, unit, _hook(metadata, path), _statistics(metadata, path))


def write_direction(path: Path, direction: Direction) -> None:
    """Write a direction so that `read_direction` returns it; atomically."""
    metadata = {"statistics": json.dumps(dict(direction.statistics))}
    if direction.hook is not None:
        metadata |= {"layer": str(direction.hook.layer), "hook": direction.hook.site}
    write_safetensors(path, {"direction": direction.vector.contiguous()}, metadata)


def _hook(metadata: Mapping[str, str], path: Path) -> Hook | None:
    if "layer" not in metadata and "hook" not in metadata:
        return None
    layer, site = metadata.get("layer", ""), _SITES.get(metadata.get("hook", ""))
    if not layer.isdecimal() or site is None:
        message = "expected metadata `layer` (a number) and `hook` (resid_pre or resid_post)"
        raise CheckpointError(f"{message}, got {dict(metadata)}", path=path)
    return Hook(int(layer), site)


def _statistics(metadata: Mapping[str, str], path: Path) -> dict[str, float]:
    try:
        values = json.loads(metadata.get("statistics", "{}"))
        numbers = {str(key): float(value) for key, value in values.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"expected `statistics` to map names to numbers: {error}", path=path) from None
    if not all(math.isfinite(value) for value in numbers.values()):
        raise CheckpointError("expected finite `statistics`", path=path)
    return numbers
