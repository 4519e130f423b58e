"""The settings of a judgement; their descriptions are the command's help."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["JudgeSettings"]


class JudgeSettings(BaseModel):
    """What is judged, on how much data. With the files, these decide every number of the report."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    tokens: Annotated[int, Field(ge=100)] = Field(
        50_000,
        description="Tokens for reconstruction, and tokens of labelled texts for each half of concepts.",
    )
    text_tokens: Annotated[int, Field(ge=2)] = Field(
        256, description="Tokens of one text; the rest is cut off."
    )
    splice_texts: Annotated[int, Field(ge=1)] = Field(200, description="Texts for the CE and KL scores.")
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Share of each label's texts that are measured on; the others choose."
    )
    steer_tokens: Annotated[int, Field(ge=1)] = Field(24, description="Tokens of a steered continuation.")
    temperature: Annotated[float, Field(ge=0)] = Field(0.8, description="Of the continuations; 0 is greedy.")
    steer_features: Annotated[int, Field(ge=1)] = Field(
        3, description="How many of a concept's best detectors are tried as steering features."
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="Of the split, the sampling and the random features."
    )
