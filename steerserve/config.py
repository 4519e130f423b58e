"""The operator's configuration, as given to vLLM's `--additional-config` under the key `steerserve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError
from .hookpoint import Site

__all__ = ["DirectionConfig", "HarvestConfig", "SaeConfig", "SteerserveConfig", "parse_config"]

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


class HarvestConfig(_Strict):
    """Write the residual stream at one hook point to activation shards in a folder (no serving)."""

    layer: int = Field(ge=0)
    hook: Site = "resid_post"
    out: Path


class SteerserveConfig(_Strict):
    """Everything the engine is told at start-up."""

    saes: list[SaeConfig] = Field(default_factory=list)
    directions: list[DirectionConfig] = Field(default_factory=list)
    max_interventions: int = Field(16, ge=1, le=64)
    harvest: HarvestConfig | None = None

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
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in ("steerserve", *problem["loc"]))
        raise ConfigError(f"{problem['msg']} - at {place} of the additional config") from None
