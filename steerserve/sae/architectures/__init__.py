"""The architectures that are trained and served, one file each."""

from __future__ import annotations

from .base import Architecture, Export, Moment, Options, Step
from .batchtopk import BatchTopK
from .gated import Gated
from .jumprelu import JumpRelu
from .kron import Kron
from .matryoshka import Matryoshka
from .standard import Standard
from .switch import Switch
from .topk import TopK
from .vaease import VaEase

__all__ = ["ARCHITECTURES", "Architecture", "Export", "Moment", "Options", "Step"]

ARCHITECTURES: dict[str, type[Architecture]] = {
    kind.name: kind for kind in (BatchTopK, Gated, JumpRelu, Kron, Matryoshka, Standard, Switch, TopK, VaEase)
}
