"""The operator's configuration, as given to vLLM's `--additional-config` under the key `steerserve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError
from .hookpoint import Site
from .spec import first_problem

__all__ = [
    "AuditConfig",
    "DirectionConfig",
    "HarvestConfig",
    "HarvestPoints",
    "SaeConfig",
    "SteerserveConfig",
    "parse_config",
]

_Layer = Annotated[int, Field(ge=0)]
ServedName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SaeConfig(_Strict):
    """One SAE to serve. `layer` and `hook` default to what the SAE's own config says.

    `resident` keeps all of it on the device, which exact top-k, per-token normalisation and `error: "drop"`
    need.
    """

    name: ServedName
    path: Path
    layer: int | None = Field(None, ge=0)
    hook: Site | None = None
    resident: bool = False


class DirectionConfig(_Strict):
    """One named direction to serve: a safetensors file with one tensor `direction` of shape [d_model]."""

    name: ServedName
    path: Path
    layer: int | None = Field(None, ge=0)
    hook: Site | None = None


class HarvestPoints(_Strict):
    """Keep the residual stream at one layer or at several; the forward pass ends at the deepest of them."""

    layer: _Layer | Annotated[tuple[_Layer, ...], Field(min_length=1)]
    hook: Site = "resid_post"

    @model_validator(mode="after")
    def _layers_are_unique(self) -> HarvestPoints:
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"expected different layers, got {list(self.layers)}")
        return self

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers, in the order in which they were named."""
        return (self.layer,) if isinstance(self.layer, int) else self.layer


class HarvestConfig(HarvestPoints):
    """Where a harvest is taken, and the folder that it goes to."""

    out: Path

    @property
    def folders(self) -> dict[int, Path]:
        """The folder of each layer's shards: `out` for a single one, below it `resid_post.3` and so on."""
        if len(self.layers) == 1:
            return {self.layers[0]: self.out}
        return {layer: self.out / f"{self.hook}.{layer}" for layer in self.layers}


class AuditConfig(_Strict):
    """Where the audit log goes, and what happens when it cannot be written.

    `on_failure` "refuse" answers 503 to requests under an enforced policy, "serve" goes on without it.
    `signing_key` is a PEM file with an Ed25519 private key; by default one is made beside the log.
    """

    folder: Path
    on_failure: Literal["refuse", "serve"] = "refuse"
    signing_key: Path | None = None


class SteerserveConfig(_Strict):
    """Everything the engine is told at start-up.

    `policies` is a folder of policy documents, `keys` a file of keys, and `open_to_all` says that a server
    without keys may be reached from other machines.
    """

    saes: list[SaeConfig] = Field(default_factory=list)
    directions: list[DirectionConfig] = Field(default_factory=list)
    max_interventions: int = Field(16, ge=1, le=64)
    harvest: HarvestPoints | None = None
    policies: Path | None = None
    keys: Path | None = None
    audit: AuditConfig | None = None
    open_to_all: bool = False

    @model_validator(mode="after")
    def _names_are_unique(self) -> SteerserveConfig:
        for kind, names in (
            ("saes", [sae.name for sae in self.saes]),
            ("directions", [direction.name for direction in self.directions]),
        ):
            repeated = {name for name in names if names.count(name) > 1}
            if repeated:
                raise ValueError(f"expected unique names in `{kind}`, got {sorted(repeated)} more than once")
        return self


def parse_config(additional_config: Any) -> SteerserveConfig | None:
    """Read the `steerserve` part of vLLM's additional config; None where there is none.

    Raises: ConfigError naming the field.
    """
    if not isinstance(additional_config, dict) or "steerserve" not in additional_config:
        return None
    try:
        return SteerserveConfig.model_validate(additional_config["steerserve"])
    except ValidationError as error:
        problem = first_problem(error, ("steerserve",), _FIELDS)
        raise ConfigError(f"{problem} of the additional config") from None


_FIELDS = {
    name
    for model in (SteerserveConfig, SaeConfig, DirectionConfig, HarvestPoints, AuditConfig)
    for name in model.model_fields
}
