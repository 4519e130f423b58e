"""SAE checkpoints: any layout on disk becomes one form in memory."""

from .directions import Direction, read_direction, write_direction
from .formats import open_sae
from .hook import Hook, parse_hook
from .manifest import Label, Manifest, read_manifest, write_manifest
from .rows import FeatureRows
from .sae import Sae
from .verify import verify_sae

__all__ = [
    "Direction",
    "FeatureRows",
    "Hook",
    "Label",
    "Manifest",
    "Sae",
    "open_sae",
    "parse_hook",
    "read_direction",
    "read_manifest",
    "verify_sae",
    "write_direction",
    "write_manifest",
]
