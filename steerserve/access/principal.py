"""A caller: who asks, and what that one may do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .limits import Limits

__all__ = ["ANYONE", "BUILT_IN", "NOBODY", "SCOPES", "SERVER_KEY", "Principal", "ScopeName"]

ScopeName = Literal["infer", "steer", "inspect", "admin"]
SCOPES: tuple[ScopeName, ...] = get_args(ScopeName)
_NO_LIMITS = Limits()


@dataclass(frozen=True)
class Principal:
    """A caller. No scope implies another: each is granted by name."""

    name: str
    scopes: frozenset[str]
    limits: Limits = _NO_LIMITS


# Where no keys are configured, and on routes that need none where they are.
ANYONE = Principal("anyone", frozenset(SCOPES))
NOBODY = Principal("nobody", frozenset())
# Whoever holds the server's own `--api-key`.
SERVER_KEY = Principal("api-key", frozenset(SCOPES))
# The names that no key file gives.
BUILT_IN = frozenset(one.name for one in (ANYONE, NOBODY, SERVER_KEY))
