"""The trainer's settings: parsed once; their descriptions are the command line's help."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steerserve.errors import ConfigError

__all__ = ["TrainSettings", "parse_settings"]


class TrainSettings(BaseModel):
    """How to train one BatchTopK SAE. Counts of tokens are counts of activation vectors."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    d_sae: Annotated[int, Field(ge=1, description="Number of features.")] = 2048
    k: Annotated[int, Field(ge=1, description="Active features per token, on average.")] = 32
    tokens: Annotated[
        int, Field(ge=1, description="Tokens to train on; the shards are gone through as often as it takes.")
    ] = 16_000_000
    batch_size: Annotated[int, Field(ge=2, description="Tokens per step.")] = 4096
    lr: Annotated[
        float | None, Field(gt=0, description="Learning rate of Adam; 2e-4·√(16384/d_sae) if not given.")
    ] = None
    warm_up: Annotated[
        int, Field(ge=0, description="Steps until the full learning rate, at most a tenth of the run.")
    ] = 1000
    held_out: Annotated[
        int, Field(ge=1, description="Tokens at the end of the shards kept for evaluation, never trained on.")
    ] = 65_536
    dead_after: Annotated[
        int | None,
        Field(
            ge=1,
            description="Tokens without firing after which a feature counts as dead and AuxK revives "
            "it; 10M, or a fiftieth of the run where that is less, if not given.",
        ),
    ] = None
    checkpoint_every: Annotated[
        int, Field(ge=1, description="Steps between checkpoints, from which a killed run goes on.")
    ] = 500
    seed: Annotated[int, Field(ge=0, description="Decides initial weights and the order of the data.")] = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, at least one."""
        return max(1, self.tokens // self.batch_size)

    @property
    def peak_lr(self) -> float:
        """The learning rate between warm-up and decay (scaling law of Gao et al. 2024, arXiv:2406.04093)."""
        return self.lr if self.lr is not None else float(2e-4 * (16384 / self.d_sae) ** 0.5)

    @property
    def patience(self) -> int:
        """Tokens without firing after which a feature is dead."""
        return self.dead_after if self.dead_after is not None else min(10_000_000, max(1, self.tokens // 50))

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step`, from 0 on: linear warm-up, flat, linear decay over the last fifth."""
        warm_up = min(self.warm_up, self.steps // 10)
        up = (step + 1) / (warm_up + 1) if step < warm_up else 1.0
        down = (self.steps - step) / (0.2 * self.steps)
        return self.peak_lr * min(up, down, 1.0)


def parse_settings(values: dict[str, object]) -> TrainSettings:
    """Validate settings from the command line or a caller.

    Raises: ConfigError naming the first setting that is wrong.
    """
    try:
        return TrainSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{first['msg']} - at setting `{name}`, got {first['input']!r}") from None
