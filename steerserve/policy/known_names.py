"""The names that requests can have here, against those that policies are limited to."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .document import Applies

__all__ = ["KnownNames"]

_KEY = "key:"


@dataclass(frozen=True)
class KnownNames:
    """Attributes:
    models: of the model and its LoRAs; None if they are not known. keys: of the keys, likewise.
    """

    models: Collection[str] | None = None
    keys: Collection[str] | None = None

    def missing(self, applies: Applies) -> list[str]:
        """The entries that no request can match now: misspelt, or of a LoRA or key that is still to come."""
        scopes = (
            [scope for scope in applies.scopes if scope.startswith(_KEY)] if self.keys is not None else []
        )
        keys = [scope for scope in scopes if scope.removeprefix(_KEY) not in (self.keys or ())]
        models = applies.models if self.models is not None else []
        return [*keys, *(model for model in models if model not in (self.models or ()))]
