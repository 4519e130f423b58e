"""`manifest.json`: what we record beside an SAE's weights and can check before serving them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steerserve.errors import CheckpointError
from steerserve.hookpoint import Site

from .files import inside, read_json
from .hook import Hook

__all__ = [
    "MANIFEST",
    "STATS",
    "HookEntry",
    "Label",
    "Manifest",
    "ModelEntry",
    "read_manifest",
    "write_manifest",
]

MANIFEST = "manifest.json"
STATS = "stats.safetensors"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=128)]
Score = Annotated[float, Field(ge=0.0, le=1.0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelEntry(_Strict):
    """The language model whose residual stream the SAE was trained on."""

    name: Annotated[str, Field(min_length=1)]
    sha256: Sha256 | None = Field(None, description="of the model's safetensors file; None if it was sharded")


class HookEntry(_Strict):
    """Where in the model: `resid_pre` or `resid_post` of a decoder layer."""

    layer: Annotated[int, Field(ge=0)]
    site: Site


class Label(_Strict):
    """What one feature detects, with its token-level scores as a detector on held-out text."""

    feature: Annotated[int, Field(ge=0)]
    label: Annotated[str, Field(min_length=1, max_length=256)]
    domain: str | None = None
    f1: Score | None = None
    precision: Score | None = None
    recall: Score | None = None


class Manifest(_Strict):
    """The whole of `manifest.json`.

    `files` maps names beside the manifest to their SHA-256. `finite` says that whoever wrote it scanned every
    tensor of those files, so that a matching SHA-256 replaces the scan.
    """

    format: Literal[1] = 1
    model: ModelEntry
    hook: HookEntry
    d_in: Annotated[int, Field(gt=0)]
    d_sae: Annotated[int, Field(gt=0)]
    architecture: Annotated[str, Field(min_length=1)]
    files: dict[FileName, Sha256]
    finite: bool = False
    labels: list[Label] = Field(default_factory=list)
    training: dict[str, float | int] = Field(default_factory=dict)

    @property
    def place(self) -> Hook:
        """The hook as every other module carries it."""
        return Hook(self.hook.layer, self.hook.site)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest beside an SAE's weights, or None where there is none.

    Raises: CheckpointError if it is malformed, or labels features that the SAE does not have.
    """
    if not (folder / MANIFEST).exists():
        return None
    path = inside(folder, MANIFEST)
    try:
        manifest = Manifest.model_validate_json(json.dumps(read_json(path)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{first['msg']} at `{where}`", path=path) from None
    for label in manifest.labels:
        if label.feature >= manifest.d_sae:
            message = f"expected labelled features < {manifest.d_sae}, got {label.feature}"
            raise CheckpointError(message, path=path)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` so that a reader sees the old one or the new one, never a part."""
    part = folder / f".{MANIFEST}.{os.getpid()}"
    part.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    part.replace(folder / MANIFEST)
