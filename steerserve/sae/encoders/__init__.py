"""How a resident SAE encodes tokens, one file for each kind of encoder."""

from .base import Encoder
from .kron import Kron
from .linear import Linear
from .routed import Routed
from .vaease import VaEase

__all__ = ["Encoder", "Kron", "Linear", "Routed", "VaEase"]
