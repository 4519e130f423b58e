"""What goes with a request from the HTTP body to admission, whatever route it came by."""

from __future__ import annotations

import secrets
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field

from .access.permission import check_limits, check_may_steer
from .access.principal import ANYONE, Principal
from .catalog import Catalog
from .errors import RequestError
from .plan import Plan
from .policy.enforcement import Caller, InForce, Merged
from .spec import SteeringSpec

__all__ = ["CARRIED", "Carried", "new_ticket"]


def new_ticket() -> str:
    """A name for the reports of one HTTP request, which may become several engine requests."""
    return secrets.token_hex(8)


@dataclass
class Carried:
    """The steering of the HTTP request that is being served in this context.

    `spec` and `own` are what the request asks for, None if nothing; `in_force` the policies that it began
    under, None where none are configured. `principal` sent it. `seconds` is what parsing and compiling took.
    Admission fills in the rest: `admitted` counts the engine requests that took a plan: zero after the reply
    began means that the route never reached admission, and that the reply must not pass for a steered one.
    `unmatched` counts, by intervention, those of them whose prompt and reply its window cannot match.
    `merged` is what they took; `refused` is why admission did not take one. `model` is the first name of the
    model, or its LoRA's, that they were for; None until then.
    """

    spec: SteeringSpec | None = None
    own: Plan | None = None
    caller: Caller = field(default_factory=Caller)
    principal: Principal = ANYONE
    in_force: InForce | None = None
    seconds: float = 0.0
    ticket: str = field(default_factory=new_ticket)
    admitted: int = 0
    unmatched: Counter[int] = field(default_factory=Counter)
    merged: Merged = field(default_factory=lambda: Merged(None))
    refused: RequestError | None = None
    model: str | None = None

    def check(self, own: Plan, catalog: Catalog) -> None:
        """Hold what the request itself asks for to what its key may.

        Raises: ForbiddenError.
        """
        check_may_steer(self.principal)
        check_limits(self.principal, own.rows, catalog)

    @property
    def wants_report(self) -> bool:
        """Whether the reply shall carry a report."""
        return self.spec is not None and self.spec.report

    @property
    def counts(self) -> bool:
        """Whether somebody will ask what the workers counted."""
        return self.wants_report or bool(self.merged.policies)


CARRIED: ContextVar[Carried | None] = ContextVar("steerserve_carried", default=None)
