"""A request's steering on its way from the HTTP body to admission, whatever route it came by."""

from __future__ import annotations

import secrets
from contextvars import ContextVar
from dataclasses import dataclass, field

from .plan import Plan
from .spec import SteeringSpec

__all__ = ["CARRIED", "Carried", "new_ticket"]


def new_ticket() -> str:
    """A name for the reports of one HTTP request, which may become several engine requests."""
    return secrets.token_hex(8)


@dataclass
class Carried:
    """The steering of the HTTP request that is being served in this context.

    `seconds` is what parsing and compiling took. `admitted` counts the engine requests that took it: zero
    after the reply began means that the route never reached admission, and that the reply must not pass for a
    steered one.
    """

    spec: SteeringSpec
    plan: Plan
    seconds: float = 0.0
    ticket: str = field(default_factory=new_ticket)
    admitted: int = 0


CARRIED: ContextVar[Carried | None] = ContextVar("steerserve_carried", default=None)
