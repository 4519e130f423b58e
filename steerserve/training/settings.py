"""The trainer's settings: parsed once; their descriptions are the command line's help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from steerserve.errors import ConfigError
from steerserve.sae.architectures import ARCHITECTURES, Options

__all__ = ["TrainSettings", "parse_settings"]

# What all SAEs that are trained on one stream must have in common.
SHARED = ("batch_size", "checkpoint_every", "device", "held_out", "seed", "tokens")


class TrainSettings(BaseModel):
    """How to train one SAE. Counts of tokens are counts of activation vectors."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    architecture: Annotated[str, Field(description=f"One of {', '.join(sorted(ARCHITECTURES))}.")] = (
        "batchtopk"
    )
    d_sae: Annotated[int, Field(ge=1, description="Number of features.")] = 2048
    tokens: Annotated[
        int, Field(ge=1, description="Tokens to train on; the shards are gone through as often as it takes.")
    ] = 16_000_000
    batch_size: Annotated[int, Field(ge=2, description="Tokens per step, over all processes.")] = 4096
    lr: Annotated[
        float | None,
        Field(
            gt=0,
            description="Learning rate of Adam; if not given, 2e-4·√(16384/d_sae), twice that for standard "
            "and gated, four times for vaease.",
        ),
    ] = None
    warm_up: Annotated[
        int, Field(ge=0, description="Steps until the full learning rate, at most a tenth of the run.")
    ] = 1000
    sparsity_warm_up: Annotated[
        int, Field(ge=0, description="Steps until the full sparsity penalty, at most a quarter of the run.")
    ] = 5000
    held_out: Annotated[
        int, Field(ge=1, description="Tokens at the end of the shards kept for evaluation, never trained on.")
    ] = 65_536
    dead_after: Annotated[
        int | None,
        Field(
            ge=1,
            description="Tokens without firing after which a feature counts as dead and is revived; 10M, or "
            "a fiftieth of the run where that is less, if not given.",
        ),
    ] = None
    checkpoint_every: Annotated[
        int, Field(ge=1, description="Steps between checkpoints, from which a killed run goes on.")
    ] = 500
    precision: Annotated[
        Literal["float32", "bfloat16"],
        Field(description="Of the encoder's product: float32 or bfloat16. All else is float32."),
    ] = "float32"
    device: Annotated[
        str | None, Field(description="Where to train; the GPU if there is one, if not given.")
    ] = None
    seed: Annotated[int, Field(ge=0, description="Decides initial weights and the order of the data.")] = 0
    options: SerializeAsAny[Options]

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, values: Any) -> Any:
        """What is set of the architecture alone stands beside the rest, and is parsed by its own class."""
        if not isinstance(values, dict) or "options" in values:
            return values
        name = values.get("architecture", "batchtopk")
        if name not in ARCHITECTURES:
            raise ValueError(f"expected `architecture` to be one of {', '.join(sorted(ARCHITECTURES))}")
        kind = ARCHITECTURES[name].Options
        own = {key: values[key] for key in values if key in kind.model_fields}
        foreign = set(values) - set(own) - set(cls.model_fields)
        for key in sorted(foreign & _all_options()):
            raise ValueError(f"expected no `{key}` for architecture {name}")
        rest = {key: value for key, value in values.items() if key not in own}
        return {**rest, "options": kind.model_validate(own)}

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, at least one."""
        return max(1, self.tokens // self.batch_size)

    @property
    def peak_lr(self) -> float:
        """The learning rate between warm-up and decay."""
        return self.lr if self.lr is not None else self.options.default_lr(self.d_sae)

    @property
    def patience(self) -> int:
        """Tokens without firing after which a feature is dead."""
        return self.dead_after if self.dead_after is not None else min(10_000_000, max(1, self.tokens // 50))

    @property
    def place(self) -> torch.device:
        """The device to train on."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step`, from 0 on: linear warm-up, flat, linear decay over the last fifth."""
        warm_up = min(self.warm_up, self.steps // 10)
        up = (step + 1) / (warm_up + 1) if step < warm_up else 1.0
        down = (self.steps - step) / (0.2 * self.steps)
        return self.peak_lr * min(up, down, 1.0)

    def warmth_at(self, step: int) -> float:
        """The share of the sparsity penalty that is in force at step `step`, from 0 on."""
        length = min(self.sparsity_warm_up, self.steps // 4)
        return min(1.0, (step + 1) / (length + 1))

    def flat(self) -> dict[str, Any]:
        """As given to `parse_settings`, with every default."""
        values = self.model_dump()
        own: dict[str, Any] = values.pop("options")
        return {**values, **own}


def parse_settings(values: Mapping[str, Any]) -> TrainSettings:
    """Validate settings from a file, the command line or a caller.

    Args: values: settings of the run and of its architecture side by side.
    Raises: ConfigError naming the first setting that is wrong.
    """
    try:
        return TrainSettings.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if not name:
            raise ConfigError(first["msg"].removeprefix("Value error, ")) from None
        known = ", ".join(sorted({*TrainSettings.model_fields, *_all_options()} - {"options"}))
        hint = f" (known: {known})" if first["type"] == "extra_forbidden" else ""
        raise ConfigError(f"{first['msg']} - at setting `{name}`, got {first['input']!r}{hint}") from None


def _all_options() -> set[str]:
    return {key for kind in ARCHITECTURES.values() for key in kind.Options.model_fields}
