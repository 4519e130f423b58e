"""The op on a GPU, the token map it reads, and the count of what it did: kernels and their launchers.

Every launcher is one launch (and a fill) whose grid follows from shapes alone. Nothing is allocated, nothing
is copied back and nothing waits, so all of it can be recorded in a CUDA graph.
"""

from .count import count_triton
from .fill import DeviceBatch, fill_triton
from .hold import hold_triton
from .note import note_triton
from .steer import steer_triton

__all__ = ["DeviceBatch", "count_triton", "fill_triton", "hold_triton", "note_triton", "steer_triton"]
