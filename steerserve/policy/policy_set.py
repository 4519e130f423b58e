"""All policies in force at one time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from .document import Policy

__all__ = ["PolicySet", "version_of"]


@dataclass(frozen=True)
class PolicySet:
    """Policies by name, in the order of their names."""

    policies: Mapping[str, Policy]

    @classmethod
    def of(cls, policies: Iterable[Policy]) -> PolicySet:
        """The set of these, whose names differ."""
        by_name = {policy.name: policy for policy in policies}
        return cls(MappingProxyType({name: by_name[name] for name in sorted(by_name)}))

    @cached_property
    def version(self) -> str:
        """Identifies every byte of every document."""
        return version_of({name: policy.sha256 for name, policy in self.policies.items()})


def version_of(hashes: Mapping[str, str]) -> str:
    """The version of a set, of the SHA-256 of each document by its policy's name."""
    lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()[:32]
