"""Which layout a path holds, told from what lies there."""

from __future__ import annotations

from pathlib import Path

from steerserve.errors import CheckpointError
from steerserve.sae.sae import Sae

from . import gemma_scope, saelens, switch

__all__ = ["open_sae"]


def open_sae(path: Path | str) -> Sae:
    """Open an SAE for serving, whatever wrote it.

    Args: path: its folder, or the weights file inside it.
    Returns: the SAE, memory-mapped; `Sae.refusal` says if it cannot be served, `Sae.needs_resident` if only
        with the whole of it on the device.
    Raises: CheckpointError naming file and tensor if anything there is damaged, untrusted, of unknown kind,
        or differs from the manifest beside it.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError("expected an SAE's folder, found nothing", path=path)
    folder = (path if path.is_dir() else path.parent).resolve()
    if (folder / saelens.WEIGHTS).exists() and (folder / saelens.CONFIG).exists():
        return saelens.open_saelens(folder)
    if (folder / gemma_scope.WEIGHTS).exists():
        return gemma_scope.open_gemma_scope(folder)
    if switch.is_switch(folder):
        return switch.open_switch(folder)
    wanted = (
        f"`{saelens.CONFIG}` + `{saelens.WEIGHTS}` (SAELens), `{gemma_scope.WEIGHTS}` (Gemma Scope) "
        f"or `{switch.CONFIG}` + `{switch.WEIGHTS}` with a router (Switch SAE)"
    )
    found = sorted(item.name for item in folder.iterdir())[:8]
    raise CheckpointError(f"expected {wanted}, found {found}", path=path)
