"""One file per on-disk layout, and the test that tells them apart."""

from .detect import open_sae

__all__ = ["open_sae"]
