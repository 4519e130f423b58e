"""The names that requests can have here, against those that policies are limited to."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from steerserve.access.principal import BUILT_IN

from .document import Applies, Policy

__all__ = ["KnownNames"]

_KEY = "key:"


@dataclass(frozen=True)
class KnownNames:
    """Attributes:
    models: of the model and its LoRAs; None if they are not known. keys: of the key file's keys, likewise;
        the server's own principals are always known.
    """

    models: Collection[str] | None = None
    keys: Collection[str] | None = None

    def missing(self, applies: Applies) -> list[str]:
        """The entries that no request can match now: misspelt, or of a LoRA or key that is still to come."""
        keys = [scope.removeprefix(_KEY) for scope in applies.scopes if scope.startswith(_KEY)]
        return [
            *(_KEY + key for key in keys if self.keys is not None and key not in {*self.keys, *BUILT_IN}),
            *(model for model in applies.models if self.models is not None and model not in self.models),
        ]

    def missing_by_policy(self, policies: Iterable[Policy]) -> dict[str, list[str]]:
        """Those entries of each policy that has any, by its name."""
        found = {policy.name: self.missing(policy.applies) for policy in policies}
        return {name: missing for name, missing in found.items() if missing}
