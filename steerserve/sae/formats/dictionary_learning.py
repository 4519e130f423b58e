"""dictionary_learning's `ae.pt` and `config.json`, all of its dictionaries.

    AutoEncoder       f = relu(W·(x − bias) + b),  x̂ = D·f + bias
    AutoEncoderNew    f = relu(W·x + b),  x̂ = D·f + decoder.bias
    AutoEncoderTopK   f = top-k(relu(W·(x − b_dec) + b)): its threshold is not used
    BatchTopKSAE      f = z where z = relu(W·(x − b_dec) + b) > threshold, one for all features
    Matryoshka        the same, with matrices stored the other way round
    Gated             f = (z + gate_bias > 0)·relu(e^r_mag·z + mag_bias) with z = W·(x − decoder_bias)
    JumpRelu          f = z where z = x @ W_enc + b_enc > threshold_j: b_dec is not subtracted

`dict_class` says which it is, or the tensors where no config does; TopK and BatchTopK have the same ones. A
threshold of −1 was never set. A backup, {step, ae, optimizer, config, norm_factor}, holds weights for
x/norm_factor, which the final file has folded.

Source: github.com/saprmarks/dictionary_learning, `dictionary.py`, `trainers/` and `training.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.files import take
from steerserve.sae.sae import Activation, Sae, Stored
from steerserve.sae.torch_file import TorchFile

from .common import TOP_K, checked, constant, expect_only, gated, jump_relu, matrix_shape, rectifier, stored
from .fields import Fields
from .trainer_config import read_trainer, trained_at

__all__ = ["is_dictionary_learning", "open_dictionary_learning"]

_BACKUP = "ae"
_LINEAR = {"decoder.weight", "encoder.weight"}
_RAW = {"W_dec", "W_enc", "b_dec", "b_enc", "threshold"}
_UNSET = "its threshold is −1, which means that training never set one: not served"


@dataclass(frozen=True)
class _File:
    """One dictionary's tensors, taken by name with their shapes checked, and its trainer's settings."""

    file: TorchFile
    config: Fields
    d_sae: int
    d_in: int
    scale: float

    def take(self, name: str, *shape: int) -> Tensor:
        return take(self.file.tensors, name, shape, self.file.path)

    def linear(self, bias: Tensor, b_dec: str, *, subtracts_b_dec: bool = True) -> Stored:
        return stored(
            self.take("encoder.weight", self.d_sae, self.d_in),
            self.take("decoder.weight", self.d_in, self.d_sae).T,
            bias,
            self.take(b_dec, self.d_in),
            subtracts_b_dec=subtracts_b_dec,
            input_scale=self.scale,
        )

    def raw(self, *, subtracts_b_dec: bool) -> Stored:
        return stored(
            self.take("W_enc", self.d_in, self.d_sae).T,
            self.take("W_dec", self.d_sae, self.d_in),
            self.take("b_enc", self.d_sae),
            self.take("b_dec", self.d_in),
            subtracts_b_dec=subtracts_b_dec,
            input_scale=self.scale,
        )

    def sae(self, architecture: str, weights: Stored, activation: Activation) -> Sae:
        hook, refusal = trained_at(self.config)
        path = self.file.path
        return Sae(architecture, self.d_in, self.d_sae, hook, path, weights, activation, refusal=refusal)


def is_dictionary_learning(file: TorchFile) -> bool:
    """Whether these are the tensors of such a file, or of a backup."""
    names = set(file.under(_BACKUP).tensors or file.tensors)
    return names >= _LINEAR or names > _RAW - {"threshold"}


def open_dictionary_learning(file: TorchFile) -> Sae:
    """Open one dictionary of dictionary_learning.

    Raises: CheckpointError if a tensor is missing, misshapen or unknown, or config and file contradict.
    """
    backup = file.under(_BACKUP)
    inner = backup if backup.tensors else file
    config = read_trainer(file.path.parent)
    if config is None:
        config = Fields(file.path, file.under("config").values)
    scale = _scale(Fields(file.path, file.values)) if inner is backup else 1.0
    sae = _builder(inner, config)(_sized(inner, config, scale))
    return checked(sae, file.path.parent, inner.tensors)


def _sized(file: TorchFile, config: Fields, scale: float) -> _File:
    if "encoder.weight" in file.tensors:
        d_sae, d_in = matrix_shape(file.tensors, "encoder.weight", file.path)
    else:
        d_in, d_sae = matrix_shape(file.tensors, "W_enc", file.path)
    config.equal("dict_size", d_sae, file.path.name)
    config.equal("activation_dim", d_in, file.path.name)
    return _File(file, config, d_sae, d_in, scale)


def _scale(values: Fields) -> float:
    """What a backup's input is multiplied by."""
    return 1.0 if values.values.get("norm_factor") is None else 1.0 / values.number("norm_factor")


def _builder(file: TorchFile, config: Fields) -> Callable[[_File], Sae]:
    """By class, or by tensors. Raises: CheckpointError if neither tells."""
    if config.values.get("dict_class") is not None:
        return _CLASSES[config.one_of("dict_class", tuple(_CLASSES))]
    if "encoder.weight" not in file.tensors:
        return _matryoshka if "group_sizes" in file.values else _jump_relu
    if "gate_bias" in file.tensors:
        return _gated
    if "b_dec" not in file.tensors:
        return _standard
    message = "expected `dict_class` in a config beside it, for TopK and BatchTopK have the same tensors"
    raise CheckpointError(message, path=file.path)


def _standard(parts: _File) -> Sae:
    old = "bias" in parts.file.tensors
    names = _LINEAR | {"encoder.bias", "bias" if old else "decoder.bias"}
    expect_only(parts.file.tensors, names, "an AutoEncoder", parts.file.path)
    bias = parts.take("encoder.bias", parts.d_sae)
    weights = parts.linear(bias, "bias" if old else "decoder.bias", subtracts_b_dec=old)
    return parts.sae("standard", weights, rectifier(parts.d_sae))


def _top_k(parts: _File) -> Sae:
    expect_only(
        parts.file.tensors,
        _LINEAR | {"b_dec", "encoder.bias", "threshold"},
        "AutoEncoderTopK",
        parts.file.path,
    )
    weights = parts.linear(parts.take("encoder.bias", parts.d_sae), "b_dec")
    sae = parts.sae("topk", weights, rectifier(parts.d_sae))
    return replace(sae, needs_resident=TOP_K, top_k=_k(parts))


def _k(parts: _File) -> int:
    """k as the file records it; older files leave it to the config.

    Raises: CheckpointError if neither does, they differ, or it is beyond the dictionary's size.
    """
    path, where = parts.file.path, parts.file.values.get("k")
    k = parts.config.positive("k") if where is None else Fields(path, parts.file.values).positive("k")
    parts.config.equal("k", k, path.name)
    if k > parts.d_sae:
        raise CheckpointError(f"expected `k` <= {parts.d_sae} features, got {k}", path=path)
    return k


def _batch_top_k(parts: _File) -> Sae:
    expect_only(
        parts.file.tensors, _LINEAR | {"b_dec", "encoder.bias", "threshold"}, "BatchTopKSAE", parts.file.path
    )
    weights = parts.linear(parts.take("encoder.bias", parts.d_sae), "b_dec")
    return _thresholded(parts, "batchtopk", weights)


def _matryoshka(parts: _File) -> Sae:
    expect_only(parts.file.tensors, _RAW, "MatryoshkaBatchTopKSAE", parts.file.path)
    return _thresholded(parts, "matryoshka_batchtopk", parts.raw(subtracts_b_dec=True))


def _thresholded(parts: _File, architecture: str, weights: Stored) -> Sae:
    value = float(parts.take("threshold"))
    sae = parts.sae(architecture, weights, jump_relu(constant(max(value, 0.0), parts.d_sae)))
    return sae if value >= 0 else replace(sae, refusal=sae.refusal or _UNSET)


def _gated(parts: _File) -> Sae:
    names = {"decoder_bias", "gate_bias", "mag_bias", "r_mag"}
    expect_only(parts.file.tensors, _LINEAR | names, "GatedAutoEncoder", parts.file.path)
    gate = parts.take("gate_bias", parts.d_sae)
    magnitude = gated(gate, parts.take("r_mag", parts.d_sae), parts.take("mag_bias", parts.d_sae))
    return parts.sae("gated", parts.linear(gate, "decoder_bias"), magnitude)


def _jump_relu(parts: _File) -> Sae:
    expect_only(parts.file.tensors, _RAW, "JumpReluAutoEncoder", parts.file.path)
    activation = jump_relu(parts.take("threshold", parts.d_sae))
    return parts.sae("jumprelu", parts.raw(subtracts_b_dec=False), activation)


_CLASSES: dict[str, Callable[[_File], Sae]] = {
    "AutoEncoder": _standard,
    "AutoEncoderNew": _standard,
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jump_relu,
    "MatroyshkaBatchTopKSAE": _matryoshka,  # as it was spelt at first
    "MatryoshkaBatchTopKSAE": _matryoshka,
}
