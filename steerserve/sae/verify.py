"""The complete check of an SAE's files: what opening a large one leaves out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from .files import check_finite, check_sha256, inside, map_npz, map_safetensors
from .formats import open_sae
from .sae import Sae
from .torch_file import map_torch

__all__ = ["verify_sae"]

_READERS: dict[str, Callable[[Path], Mapping[str, Tensor]]] = {
    ".npz": map_npz,
    ".pt": map_torch,
    ".pth": map_torch,
    ".safetensors": lambda file: map_safetensors(file)[0],
}


def verify_sae(path: Path | str, progress: Callable[[int, int], None] | None = None) -> Sae:
    """Read every byte: compare each file to its manifest, and scan each weight for NaN and infinity.

    Args:
        path: as for `open_sae`.
        progress: called after every few MiB with the bytes done and the bytes to do.
    Returns: the SAE, opened.
    Raises: CheckpointError as `open_sae` does, for a sha256 that is not the manifest's, and for any weight
        that is not finite.
    """
    sae = open_sae(path)
    folder = sae.path.parent
    listed = sae.manifest.files if sae.manifest else {}
    hashes = {inside(folder, name): expected for name, expected in listed.items()}
    weights = [file for file in {sae.path: None, **hashes} if file.suffix in _READERS]
    tensors = {file: _READERS[file.suffix](file) for file in weights}
    to_do = sum(file.stat().st_size for file in hashes)
    to_do += sum(part.nbytes for parts in tensors.values() for part in parts.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, to_do)

    for file, expected in hashes.items():
        check_sha256(file, expected, advance)
    for file, parts in tensors.items():
        check_finite(parts, file, advance)
    return sae
