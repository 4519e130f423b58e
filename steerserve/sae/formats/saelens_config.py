"""SAELens' `cfg.json`, of any version, read into one frozen object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerserve.errors import CheckpointError
from steerserve.sae.files import read_json
from steerserve.sae.hook import Hook
from steerserve.sae.normalisation import Normalisation

from .common import TOP_K, stream
from .fields import Fields

__all__ = ["Config", "read_config"]

_SERVED = ("gated", "jumprelu", "standard", "topk")
_EXPORTED_AS_JUMPRELU = ("batchtopk", "matryoshka_batchtopk")
_PER_TOKEN: tuple[Normalisation, ...] = ("constant_norm_rescale", "layer_norm")
_NORMALISATIONS = ("none", "expected_average_only_in", "covariance_whitening", *_PER_TOKEN)


@dataclass(frozen=True)
class Config:
    """What of `cfg.json` decides how the SAE computes.

    `architecture` is how the tensors are read, `trained_as` how they were trained (batchtopk is saved as
    jumprelu). `refusal` says why it cannot be served, `needs_resident` why only with the whole SAE on the
    device; each is None where there is no such reason.
    """

    architecture: str
    trained_as: str
    d_in: int
    d_sae: int
    hook: Hook | None
    apply_b_dec_to_input: bool
    normalize_activations: str
    finetuning_scaling_factor: bool
    rescale_acts_by_decoder_norm: bool
    k: int | None
    refusal: str | None
    needs_resident: str | None

    @property
    def normalisation(self) -> Normalisation:
        """What is done to each token before it is encoded, beyond what folds into the weights."""
        return next((how for how in _PER_TOKEN if how == self.normalize_activations), "none")


def read_config(path: Path) -> Config:
    """Read `cfg.json` as sae_lens 6.54 does, with the defaults of the version that wrote it.

    Raises: CheckpointError if a value is of the wrong kind, or the architecture is unknown.
    """
    raw = read_json(path)
    metadata = raw.get("metadata", {})
    if not isinstance(metadata, dict):
        raise CheckpointError("expected `metadata` to be an object", path=path)
    fields = Fields(path, raw if _is_modern(raw, metadata) else _modernised(raw, path))
    names = Fields(path, {**raw, **metadata})
    architecture = fields.one_of("architecture", _SERVED)
    trained = metadata.get("training_architecture")
    hook, hook_refusal = _hook(names)
    return Config(
        architecture=architecture,
        trained_as=trained if trained in _EXPORTED_AS_JUMPRELU else architecture,
        d_in=fields.positive("d_in"),
        d_sae=fields.positive("d_sae"),
        hook=hook,
        apply_b_dec_to_input=fields.flag("apply_b_dec_to_input", default=True),
        normalize_activations=fields.one_of("normalize_activations", _NORMALISATIONS, default="none"),
        finetuning_scaling_factor=fields.flag("finetuning_scaling_factor", default=False),
        rescale_acts_by_decoder_norm=architecture == "topk"
        and fields.flag("rescale_acts_by_decoder_norm", default=False),
        k=_top_k(fields) if architecture == "topk" else None,
        refusal=_refusal(fields) or hook_refusal,
        needs_resident=_needs_resident(fields, architecture),
    )


def _is_modern(raw: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    version = str(raw.get("sae_lens_version") or metadata.get("sae_lens_version") or "0")
    major = version.partition(".")[0]
    return major.isdigit() and int(major) >= 6


def _modernised(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """SAELens < 6: other names, and another place for top-k."""
    new = {"architecture": "standard", **raw}
    kwargs = raw.get("activation_fn_kwargs") or {}
    activation = raw.get("activation_fn_str", raw.get("activation_fn", "relu"))
    if activation == "topk" and isinstance(kwargs, dict) and kwargs.get("k") is not None:
        new |= {"architecture": "topk", "k": kwargs["k"]}
    elif activation != "relu":
        raise CheckpointError(f"expected activation function relu or topk, got {activation!r}", path=path)
    if "hook_z" in str(raw.get("hook_name", raw.get("hook_point", ""))):
        new.setdefault("reshape_activations", "hook_z")
    old = raw.get("normalize_activations")
    if old is None or isinstance(old, bool):
        new["normalize_activations"] = "expected_average_only_in" if old else "none"
    return new


def _hook(names: Fields) -> tuple[Hook | None, str | None]:
    keys = ("hook_name", "hook_point", "hf_hook_name")
    name = next((names.values[key] for key in keys if names.values.get(key)), None)
    if name is None:
        return None, None
    layer = names.values.get("hook_layer", names.values.get("hook_point_layer"))
    return stream(str(name).replace("{layer}", str(layer)))


def _refusal(fields: Fields) -> str | None:
    values = fields.values
    if values.get("reshape_activations", "none") != "none" or values.get("hook_head_index") is not None:
        return "it reads attention heads, not the residual stream: not served"
    if values.get("normalize_activations") == "covariance_whitening":
        return "covariance_whitening was not folded into the weights: not served (save the inference model)"
    return None


def _needs_resident(fields: Fields, architecture: str) -> str | None:
    normalisation = fields.values.get("normalize_activations")
    reasons = [TOP_K] if architecture == "topk" else []
    if normalisation in _PER_TOKEN:
        reasons.append(f"its normalize_activations {normalisation} depends on each token and does not fold")
    return ", and ".join(reasons) or None


def _top_k(fields: Fields) -> int:
    k = fields.positive("k")
    if k > fields.positive("d_sae"):
        raise CheckpointError(f"expected `k` <= d_sae, got {k}", path=fields.path)
    return k
