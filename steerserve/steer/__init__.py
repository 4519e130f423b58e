"""The op at the layer: fixed buffers, a plain reference, and the kernels that are held to it."""

from .buffers import PointBuffers
from .cpu import steer_cpu
from .reference import steer_reference

__all__ = ["PointBuffers", "steer_cpu", "steer_reference"]
