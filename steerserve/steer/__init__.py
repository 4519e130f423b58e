"""The op at the layer: fixed buffers, a plain reference, and the kernels that are held to it."""

from .buffers import PointBuffers
from .cpu import hold_cpu, note_cpu, steer_cpu
from .history import NEVER, History
from .reference import hold_reference, note_reference, steer_reference

__all__ = [
    "NEVER",
    "History",
    "PointBuffers",
    "hold_cpu",
    "hold_reference",
    "note_cpu",
    "note_reference",
    "steer_cpu",
    "steer_reference",
]
