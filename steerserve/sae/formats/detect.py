"""Which layout a path holds, told from what lies there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from steerserve.errors import CheckpointError
from steerserve.sae.files import inside
from steerserve.sae.sae import Sae
from steerserve.sae.torch_file import TorchFile, read_torch

from . import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    openai,
    openmoss,
    qwen_scope,
    saelens,
    sparsify,
    switch,
    trained,
)

__all__ = ["Found", "open_sae", "recognise"]

_TORCH = (".pt", ".pth")
_WEIGHTS = (*_TORCH, ".safetensors", ".npz")


@dataclass(frozen=True)
class Found:
    """An SAE that lies at a path.

    Attributes:
        layout: whose it is, for people.
        open: opens it; see `open_sae`.
    """

    layout: str
    open: Callable[[], Sae]


@dataclass(frozen=True)
class _Folder:
    """A layout that is known by the names of its files: the config (if it needs one) and the weights."""

    layout: str
    config: str | None
    weights: str
    open: Callable[[Path], Sae]

    def lies_in(self, folder: Path, weights: str | None) -> bool:
        if weights is not None and weights != self.weights:
            return False
        return (folder / self.weights).exists() and (self.config is None or (folder / self.config).exists())


_FOLDERS = (
    _Folder("SAELens", saelens.CONFIG, saelens.WEIGHTS, saelens.open_saelens),
    _Folder("sparsify", sparsify.CONFIG, sparsify.WEIGHTS, sparsify.open_sparsify),
    _Folder("OpenMOSS", openmoss.CONFIG, openmoss.WEIGHTS, openmoss.open_openmoss),
    _Folder("Llama Scope", llama_scope.CONFIG, llama_scope.WEIGHTS, llama_scope.open_llama_scope),
    _Folder("Gemma Scope", None, gemma_scope.WEIGHTS, gemma_scope.open_gemma_scope),
    _Folder("Gemma Scope 2", None, gemma_scope_2.WEIGHTS, gemma_scope_2.open_gemma_scope_2),
)


def open_sae(path: Path | str) -> Sae:
    """Open an SAE for serving, whatever wrote it.

    Args: path: its folder, or the weights file inside it.
    Returns: the SAE, memory-mapped; `Sae.refusal` says if it cannot be served, `Sae.needs_resident` if only
        with the whole of it on the device.
    Raises: CheckpointError naming file and tensor if anything there is damaged, untrusted, of unknown kind,
        or differs from the manifest beside it.
    """
    return recognise(path).open()


def recognise(path: Path | str) -> Found:
    """Tell the layout of what lies at a path by the names of its files, or of the tensors in a `.pt`.

    Args: path: a folder, or the weights file inside it.
    Raises: CheckpointError if nothing known lies there, or several files do of which one has to be named.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError("expected an SAE's folder, found nothing", path=path)
    folder = (path if path.is_dir() else path.parent).resolve()
    named = path.name if not path.is_dir() and path.suffix in _WEIGHTS else None
    if named is not None and path.suffix in _TORCH:
        return _recognise_torch(inside(folder, named))
    if named is not None and f"{folder.name}/{named}" == llama_scope.WEIGHTS:
        folder, named = folder.parent, llama_scope.WEIGHTS
    # Named as SAELens names its files: the config tells them apart.
    if named in (None, trained.WEIGHTS) and trained.is_trained(folder):
        return Found("steerserve", lambda: trained.open_trained(folder))
    for known in _FOLDERS:
        if known.lies_in(folder, named):
            return _in_folder(known, folder)
    return _recognise_torch(_only_torch_file(folder, path))


def _in_folder(known: _Folder, folder: Path) -> Found:
    return Found(known.layout, lambda: known.open(folder))


def _recognise_torch(path: Path) -> Found:
    file = read_torch(path)
    layout, opener = _torch_layout(file)
    return Found(layout, lambda: opener(file))


def _torch_layout(file: TorchFile) -> tuple[str, Callable[[TorchFile], Sae]]:
    if switch.is_switch(file.tensors):
        return "switch_sae", switch.open_switch
    if goodfire.is_goodfire(file.tensors):
        return "Goodfire", goodfire.open_goodfire
    if openai.is_openai(file.tensors):
        return "OpenAI", openai.open_openai
    if qwen_scope.is_qwen_scope(file.tensors):
        return "Qwen-Scope", qwen_scope.open_qwen_scope
    if dictionary_learning.is_dictionary_learning(file):
        return "dictionary_learning", dictionary_learning.open_dictionary_learning
    message = (
        "expected the tensors of dictionary_learning, OpenAI, Qwen-Scope, Goodfire, or those with a router"
    )
    found = sorted(file.tensors)[:12]
    raise CheckpointError(f"{message} of a Switch SAE, got {found}", path=file.path)


def _only_torch_file(folder: Path, path: Path) -> Path:
    names = sorted(item.name for item in folder.iterdir())
    files = [name for name in names if name.endswith(_TORCH)]
    if len(files) == 1 or "ae.pt" in files:
        return inside(folder, "ae.pt" if "ae.pt" in files else files[0])
    if files:
        message = f"expected one SAE, found {len(files)} files: name one of them, as in `{path / files[0]}`"
        raise CheckpointError(message, path=path)
    pairs = [
        f"`{known.config}` + `{known.weights}`" if known.config else f"`{known.weights}`"
        for known in _FOLDERS
    ]
    wanted = ", ".join(f"{pair} ({known.layout})" for pair, known in zip(pairs, _FOLDERS, strict=True))
    raise CheckpointError(f"expected {wanted}, or a `.pt` of tensors, found {names[:8]}", path=path)
