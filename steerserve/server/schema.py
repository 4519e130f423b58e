"""What the management routes answer: typed, so that the OpenAPI document is right."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

__all__ = [
    "Capabilities",
    "DirectionInfo",
    "DirectionList",
    "Health",
    "LabelInfo",
    "Limits",
    "OpInfo",
    "SaeInfo",
    "SaeList",
]


class LabelInfo(BaseModel):
    """What one feature detects, with its score as a detector on held-out text."""

    feature: int
    label: str
    domain: str | None = None
    f1: float | None = None


class SaeInfo(BaseModel):
    """One SAE that is served."""

    name: str
    architecture: str
    d_in: int = Field(description="width of the residual stream it reads")
    d_sae: int = Field(description="number of features")
    hook_point: str
    layer: int = Field(description="decoder layer after which it reads and writes; -1 for the embeddings")
    statistics: bool = Field(description='whether `unit: "max"` can be used')
    resident: bool = Field(description='whether `error: "drop"` can be used')
    files: dict[str, str] = Field(description="SHA-256 of its files, as its manifest records them")
    labels: list[LabelInfo]
    labels_total: int


class SaeList(BaseModel):
    """Every SAE, with one page of its labels."""

    object: Literal["list"] = "list"
    data: list[SaeInfo]


class DirectionInfo(BaseModel):
    """One named direction that is served."""

    name: str
    d_in: int
    hook_point: str
    layer: int = Field(description="decoder layer after which it is applied; -1 for the embeddings")


class DirectionList(BaseModel):
    """Every named direction."""

    object: Literal["list"] = "list"
    data: list[DirectionInfo]


class OpInfo(BaseModel):
    """One operation on a feature's activation f."""

    op: str
    meaning: str
    needs_value: bool
    units: list[str]


class Limits(BaseModel):
    """Beyond these a request is refused."""

    interventions: int
    features_per_hook_point: int = Field(description="interventions and conditions together")
    selectors: int = Field(description="entries in one list of `where`")
    json_characters: int


class Capabilities(BaseModel):
    """What a request may ask for."""

    steerserve: str
    vllm: str
    model: str
    ops: list[OpInfo]
    phases: list[str]
    selectors: list[str]
    error_modes: list[str]
    limits: Limits
    routes: list[str]


class Health(BaseModel):
    """Whether steering requests can be served."""

    status: Literal["ok", "degraded", "not_configured"]
    problems: dict[str, str] = Field(
        default_factory=dict, description="what is not as it should be, of `policies`, `keys` and `audit`"
    )
    warnings: dict[str, str] = Field(
        default_factory=dict, description="by policy: names that it is limited to, and that nothing has now"
    )
    audit_head: str | None = Field(
        None, description="where the audit log is, to keep elsewhere for `steerserve audit verify --head`"
    )
