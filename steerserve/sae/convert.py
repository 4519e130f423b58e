"""An SAE of any layout, written again as SAELens' own with our manifest: whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from steerserve.errors import CheckpointError

from .files import check_finite, inside, map_safetensors, read_json, sha256_of, take
from .formats import open_sae
from .formats.saelens import CONFIG, WEIGHTS
from .formats.saelens_writer import inexpressible, saelens_bytes, write_saelens
from .hook import Hook
from .manifest import STATS, HookEntry, Manifest, ModelEntry, write_manifest
from .sae import Sae

__all__ = ["convert_sae"]

# SAELens' own statistics: log10 of each feature's frequency.
_SPARSITY = "sparsity.safetensors"
_CONFIGS = ("cfg.json", "config.json", "hyperparams.json")
_SECTIONS = ("metadata", "trainer")
_MODEL_KEYS = ("model_name", "lm_name", "model")


def convert_sae(
    path: Path | str,
    out: Path,
    *,
    model: str | None = None,
    hook: Hook | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `cfg.json`, `sae_weights.safetensors` and `manifest.json`, and keep statistics and labels.

    Args:
        path: as for `open_sae`. out: a folder that is not there yet; it appears when all of it is written.
        model, hook: where it was trained, if its files do not say; else what to say instead of `model`.
        progress: called after every few MiB with the bytes done and the bytes to do.
    Raises: CheckpointError if `out` exists, SAELens cannot express the SAE, a weight is not finite, or
        nothing says the model or the hook.
    """
    if out.exists():
        raise CheckpointError("expected a folder that is not there yet", path=out)
    sae = open_sae(path)
    if (reason := inexpressible(sae)) is not None:
        raise CheckpointError(reason, path=sae.path)
    place, name = _place(sae, hook), _model(sae, model)
    part = out.parent / f".{out.name}.{os.getpid()}"
    try:
        part.mkdir(parents=True)
        _write(part, sae, place, name, _Counter(2 * saelens_bytes(sae), progress))
        map_safetensors(part / WEIGHTS)
        part.replace(out)
    except OSError as error:
        raise CheckpointError(f"expected to write it: {error}", path=out) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _Counter:
    """Sums what each step reports into bytes done of bytes to do."""

    def __init__(self, to_do: int, report: Callable[[int, int], None] | None) -> None:
        self._done, self._to_do, self._report = 0, to_do, report

    def __call__(self, count: int) -> None:
        self._done = min(self._done + count, self._to_do)
        if self._report is not None:
            self._report(self._done, self._to_do)


def _write(folder: Path, sae: Sae, place: Hook, model: ModelEntry, count: Callable[[int], None]) -> None:
    metadata: dict[str, object] = {"hook_name": place.name, "model_name": model.name}
    write_saelens(folder, sae, metadata, count)
    names = [CONFIG, WEIGHTS, *_copy_statistics(folder, sae)]
    old = sae.manifest
    manifest = Manifest(
        model=model,
        hook=HookEntry(layer=place.layer, site=place.site),
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        architecture=sae.architecture,
        files={name: sha256_of(folder / name, count) for name in names},
        finite=True,
        labels=old.labels if old else [],
        training=old.training if old else {},
    )
    write_manifest(folder, manifest)


def _copy_statistics(folder: Path, sae: Sae) -> Iterator[str]:
    """Copy what is on record about the features, which stays true: activations keep their units."""
    source = sae.path.parent
    if sae.statistics:
        shutil.copyfile(inside(source, STATS), folder / STATS)
        yield STATS
    if (source / _SPARSITY).exists():
        tensors, _ = map_safetensors(inside(source, _SPARSITY))
        take(tensors, "sparsity", (sae.d_sae,), source / _SPARSITY)
        check_finite(tensors, source / _SPARSITY)
        shutil.copyfile(inside(source, _SPARSITY), folder / _SPARSITY)
        yield _SPARSITY


def _place(sae: Sae, given: Hook | None) -> Hook:
    if sae.hook is not None and given is not None and given != sae.hook:
        message = f"expected the hook its files say, {sae.hook.name}, got {given.name}"
        raise CheckpointError(message, path=sae.path)
    place = sae.hook or given
    if place is None:
        message = "expected its files to say at which layer it was trained; they do not"
        raise CheckpointError(f"{message} (give --hook blocks.LAYER.hook_resid_post)", path=sae.path)
    return place


def _model(sae: Sae, given: str | None) -> ModelEntry:
    if given is None and sae.manifest is not None:
        return sae.manifest.model
    name = given or next(_models_in_configs(sae.path), None)
    if name is None:
        message = "expected its files to say which model it was trained on; they do not"
        raise CheckpointError(f"{message} (give --model NAME)", path=sae.path)
    return ModelEntry(name=name)


def _models_in_configs(weights: Path) -> Iterator[str]:
    """Names of models in the config files beside or above the weights, the likeliest first."""
    for folder in weights.parents[:2]:
        for name in _CONFIGS:
            if not (folder / name).exists():
                continue
            try:
                whole = read_json(inside(folder, name))
            except CheckpointError:  # another program's file: opening the SAE did not need it
                continue
            for section in (*(whole.get(key) for key in _SECTIONS), whole):
                values = section if isinstance(section, dict) else {}
                names = (values.get(key) for key in _MODEL_KEYS)
                yield from (said for said in names if isinstance(said, str) and said)
