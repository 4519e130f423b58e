"""`config.json` beside an `ae.pt`: what dictionary_learning and its descendants say of an SAE."""

from __future__ import annotations

import re
from pathlib import Path

from steerserve.sae.files import inside
from steerserve.sae.hook import Hook

from .fields import Fields

__all__ = ["CONFIG", "read_trainer", "trained_at"]

CONFIG = "config.json"

_STREAM = re.compile(r"(resid_pre|resid_post)(?:_layer_\d+)?")


def read_trainer(folder: Path) -> Fields | None:
    """The trainer's settings beside the weights, or above them where they lie in `checkpoints`.

    Returns: the object under `trainer`, or all of the file where there is none; None without a file.
    Raises: CheckpointError if the file holds anything else.
    """
    above = folder.parent if folder.name == "checkpoints" else folder
    for place in (folder, above):
        if (place / CONFIG).exists():
            whole = Fields.read(inside(place, CONFIG))
            return whole.section("trainer") if whole.values.get("trainer") is not None else whole
    return None


def trained_at(fields: Fields) -> tuple[Hook | None, str | None]:
    """Where it was trained, or why it is not served there.

    The trainer reads what decoder layer `layer` puts out, unless `submodule_name` says otherwise.

    Raises: CheckpointError if either is of the wrong kind.
    """
    name = fields.text("submodule_name") or "resid_post"
    match = _STREAM.fullmatch(name)
    if match is None:
        return None, f"it reads `{name[:80]}`, not the residual stream: not served"
    if fields.values.get("layer") is None:
        return None, None
    return Hook(fields.whole("layer"), "resid_pre" if match[1] == "resid_pre" else "resid_post"), None
