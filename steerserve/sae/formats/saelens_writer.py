"""SAELens' `cfg.json` and `sae_weights.safetensors`, written from an SAE of any layout a block at a time.

The tensors are float32 whatever the source was, so that SAELens computes what is served. Where the source
subtracts its own b_dec, SAELens does too (`apply_b_dec_to_input`), which keeps its sums rounded alike; any
other pre-bias, and every scale, is folded.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.sae import Sae

from .saelens import CONFIG, WEIGHTS

__all__ = ["inexpressible", "saelens_bytes", "write_saelens"]

# The version of SAELens whose layout this is; SAELens reads it to know which defaults apply.
_LAYOUT = "6.54.12"
_NUMBERS_AT_ONCE = 2**21
_ARCHITECTURES = {
    "batchtopk": "jumprelu",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "standard": "standard",
    "topk": "topk",
}
_VECTORS = {
    "gated": ("b_gate", "b_mag", "r_mag"),
    "jumprelu": ("b_enc", "threshold"),
    "standard": ("b_enc",),
    "topk": ("b_enc",),
}


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file: its shape, and its first byte."""

    shape: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        return self.start + 4 * math.prod(self.shape)


def inexpressible(sae: Sae) -> str | None:
    """Why SAELens has no architecture that computes what this SAE does, or None if it has one."""
    if sae.refusal is not None:
        return sae.refusal
    if sae.router is not None or sae.architecture not in _ARCHITECTURES:
        return f"expected an architecture that SAELens knows, got {sae.architecture}: not converted"
    return None


def saelens_bytes(sae: Sae) -> int:
    """How many bytes of weights `write_saelens` writes."""
    return 4 * sum(math.prod(shape) for shape in _shapes(sae).values())


def write_saelens(
    folder: Path, sae: Sae, metadata: dict[str, object], progress: Callable[[int], None] | None = None
) -> None:
    """Write an SAE for which `inexpressible` is None.

    Args:
        folder: exists. metadata: what stands under that key beside version and architecture (`hook_name`, …).
        progress: told the bytes of each block.
    Raises: CheckpointError if a weight is not finite, or there is no room for the file.
    """
    subtracts = _subtracts_b_dec(sae)
    config = json.dumps(_config(sae, metadata, subtracts), indent=1) + "\n"
    path = folder / WEIGHTS
    header, places = _header(_shapes(sae))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        # Before the first block, so that a disk that is too small is found out now.
        os.posix_fallocate(descriptor, 0, max(place.end for place in places.values()))
        os.pwrite(descriptor, header, 0)
        _write(descriptor, places["b_dec"], 0, _finite(sae.b_dec, "b_dec", sae))
        for start, block in _blocks(sae, subtracts):
            for name, values in block.items():
                finite = _finite(values, name, sae)
                _write(descriptor, places[name], start, finite, columns=name == "W_enc")
            if progress is not None:
                progress(sum(4 * values.numel() for values in block.values()))
        os.fsync(descriptor)
    except OSError as error:
        raise CheckpointError(f"expected to write it: {error}", path=path) from None
    finally:
        os.close(descriptor)
    (folder / CONFIG).write_text(config, encoding="utf-8")


def _shapes(sae: Sae) -> dict[str, tuple[int, ...]]:
    vectors = _VECTORS[_ARCHITECTURES[sae.architecture]]
    matrices = {"W_dec": (sae.d_sae, sae.d_in), "W_enc": (sae.d_in, sae.d_sae), "b_dec": (sae.d_in,)}
    return matrices | dict.fromkeys(vectors, (sae.d_sae,))


def _header(shapes: dict[str, tuple[int, ...]]) -> tuple[bytes, dict[str, _Place]]:
    """A safetensors header, and where it says the tensors lie."""
    places, end = {}, 0
    for name, shape in shapes.items():
        places[name] = _Place(shape, end)
        end = places[name].end
    entries = {
        name: {"dtype": "F32", "shape": list(place.shape), "data_offsets": [place.start, place.end]}
        for name, place in places.items()
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    moved = {name: _Place(place.shape, 8 + len(text) + place.start) for name, place in places.items()}
    return len(text).to_bytes(8, "little") + text, moved


def _subtracts_b_dec(sae: Sae) -> bool:
    stored = sae.stored
    return stored.pre_bias is not None and torch.equal(stored.pre_bias / stored.input_scale, stored.b_dec)


def _blocks(sae: Sae, subtracts: bool) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Features [start, …) in SAELens' names and shapes, float64."""
    step = max(1, _NUMBERS_AT_ONCE // sae.d_in)
    for start in range(0, sae.d_sae, step):
        yield start, _block(sae, slice(start, min(start + step, sae.d_sae)), subtracts)


def _block(sae: Sae, which: slice, subtracts: bool) -> dict[str, Tensor]:
    stored, act = sae.stored, sae.activation
    encoder, bias = stored.encoder[which].double(), stored.bias[which].double()
    if stored.pre_bias is not None and not subtracts:
        bias = bias - encoder @ stored.pre_bias.double()
    row_scale = stored.encoder_scale[which].double()
    bias = bias * row_scale
    decoder_scale = stored.decoder_scale[which].double() / stored.input_scale
    block = {
        "W_dec": stored.decoder[which].double() * decoder_scale.unsqueeze(1),
        "W_enc": (encoder * (row_scale * stored.input_scale).unsqueeze(1)).T,
    }
    vectors = {"b_enc": bias, "threshold": act.threshold[which].double()}
    if sae.architecture == "gated":
        scale = act.scale[which].double()
        vectors = {"b_gate": bias, "b_mag": scale * bias + act.shift[which].double(), "r_mag": scale.log()}
    return block | {name: vectors[name] for name in _VECTORS[_ARCHITECTURES[sae.architecture]]}


def _finite(values: Tensor, name: str, sae: Sae) -> Tensor:
    rounded = values.float()
    if not torch.isfinite(rounded).all():
        raise CheckpointError("expected finite weights, got NaN or infinity", path=sae.path, tensor=name)
    return rounded


def _write(descriptor: int, place: _Place, first: int, values: Tensor, *, columns: bool = False) -> None:
    """Write rows [first, …) of a tensor; or `columns`, of which each of its rows holds a part."""
    if not columns:
        _write_all(descriptor, values, place.start + 4 * first * math.prod(place.shape[1:]))
        return
    for row, part in enumerate(values.contiguous()):
        _write_all(descriptor, part, place.start + 4 * (row * place.shape[1] + first))


def _write_all(descriptor: int, values: Tensor, start: int) -> None:
    data = values.contiguous().numpy().data.cast("B")
    while data:
        written = os.pwrite(descriptor, data, start)
        data, start = data[written:], start + written


def _config(sae: Sae, metadata: dict[str, object], subtracts: bool) -> dict[str, object]:
    architecture = _ARCHITECTURES[sae.architecture]
    config: dict[str, object] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": subtracts,
        "normalize_activations": sae.normalisation,
        "reshape_activations": "none",
    }
    if architecture == "topk":
        config |= {"k": sae.top_k, "rescale_acts_by_decoder_norm": False}
    trained = {} if sae.architecture == architecture else {"training_architecture": sae.architecture}
    return config | {"metadata": {"sae_lens_version": _LAYOUT, **metadata, **trained}}
