"""Where in the residual stream an SAE or a direction reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import ConfigError

__all__ = ["HookPoint", "Site"]

Site = Literal["resid_pre", "resid_post"]


@dataclass(frozen=True, order=True)
class HookPoint:
    """The residual stream after `index` decoder layers: 0 is the embeddings, `n_layers` the last layer's
    output.

    `resid_pre` of layer L and `resid_post` of layer L−1 are the same tensor, hence the same hook point.
    """

    index: int

    @classmethod
    def of(cls, layer: int, site: Site, n_layers: int) -> HookPoint:
        """The hook point of `site` at decoder layer `layer` of a model of `n_layers`.

        Raises: ConfigError if the model has no such layer.
        """
        if not 0 <= layer < n_layers:
            raise ConfigError(f"expected `layer` < {n_layers}, the model's decoder layers, got {layer}")
        return cls(layer if site == "resid_pre" else layer + 1)

    @property
    def name(self) -> str:
        """`resid_pre.0` for the embeddings, `resid_post.L` everywhere else."""
        return "resid_pre.0" if self.index == 0 else f"resid_post.{self.index - 1}"
