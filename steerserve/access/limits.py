"""What a key is held to, beyond its scopes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steerserve.spec import Op

__all__ = ["Limits"]

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
_SaeName = Annotated[str, Field(pattern="^" + _NAME)]
_SourceName = Annotated[str, Field(pattern="^(direction:)?" + _NAME)]
_Index = Annotated[int, Field(ge=0, lt=2**31)]
# Lax in the container alone: YAML has lists, a frozen object holds tuples.
_Range = Annotated[tuple[_Index, _Index], Field(strict=False)]
_Ranges = Annotated[tuple[_Range, ...], Field(strict=False, max_length=4096)]


class Limits(BaseModel):
    """All of them hold at once; one that is left out limits nothing.

    `saes` are the SAEs that a request may name, and directions as `direction:NAME`. `ops` are what it may
    do, `abort` for `then: "abort"`. `features` are half-open ranges by SAE; where it stands without `saes`,
    the SAEs in it are the only ones. `saes` and `features` cover what is changed and what a condition reads.
    `max_value` bounds |value| in raw units, after `unit: "max"` is resolved, and the factor of `scale`.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    saes: Annotated[tuple[_SourceName, ...], Field(strict=False)] | None = None
    ops: Annotated[tuple[Op | Literal["abort"], ...], Field(strict=False)] | None = None
    features: dict[_SaeName, _Ranges] | None = None
    max_value: float | None = Field(None, ge=0)
    max_interventions: int | None = Field(None, ge=0)
    requests_per_minute: int | None = Field(None, ge=1, le=100_000)

    @model_validator(mode="after")
    def _agree(self) -> Limits:
        for name, ranges in (self.features or {}).items():
            if self.saes is not None and name not in self.saes:
                raise ValueError(f"expected the SAEs of `features` among `saes`, got `{name}`")
            for start, stop in ranges:
                if start >= stop:
                    raise ValueError(f"expected ranges [start, stop) of `{name}`, got [{start}, {stop}]")
        return self

    @property
    def sources(self) -> tuple[str, ...] | None:
        """SAEs, and directions as `direction:NAME`, that may be named; None for all."""
        if self.saes is not None:
            return self.saes
        return None if self.features is None else tuple(self.features)
