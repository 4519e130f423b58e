"""The per-feature numbers of the activation formula."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Activation"]


@dataclass(frozen=True)
class Activation:
    """The per-feature numbers of the activation formula, [F] each, any float dtype (see FeatureRows).

    Views of the mapped file, or constants expanded to length.
    """

    threshold: Tensor
    scale: Tensor
    shift: Tensor
    floor: Tensor
