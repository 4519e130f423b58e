"""One file per on-disk layout, and the test that tells them apart."""

from .detect import Found, open_sae, recognise

__all__ = ["Found", "open_sae", "recognise"]
