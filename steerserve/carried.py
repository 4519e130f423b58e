"""What goes with a request from the HTTP body to admission, whatever route it came by."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from .access.permission import check_limits, check_may_steer
from .access.principal import ANYONE, Principal
from .catalog import Catalog
from .errors import RequestError
from .plan import Plan
from .policy.enforcement import Caller, InForce, Merged
from .spec import SteeringSpec

__all__ = ["CARRIED", "Carried", "Ends", "new_ticket"]


def new_ticket() -> str:
    """A name for the reports of one HTTP request, which may become several engine requests."""
    return secrets.token_hex(8)


class Ends:
    """Where the front end ended each engine request of one HTTP request.

    The engine may have run on by then; what counts for a reply is what its client was given.
    """

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self._open: set[str] = set()
        self._all_known: asyncio.Event | None = None

    def begin(self, request_id: str) -> None:
        """The front end waits for the output of this engine request."""
        self._open.add(request_id)

    def end(self, request_id: str, position: int) -> None:
        """It does no more. Args: position: the first one that does not count."""
        self._open.discard(request_id)
        self.known.setdefault(request_id, position)
        if self._all_known is not None and not self._open:
            self._all_known.set()

    async def settled(self, timeout: float = 2.0) -> None:
        """Wait until nothing is open. A client that left is noticed before vLLM ends what it asked for."""
        if self._open:
            self._all_known = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_known.wait(), timeout)


@dataclass
class Carried:
    """The steering of the HTTP request that is being served in this context.

    `spec` and `own` are what the request asks for, None if nothing; `in_force` the policies that it began
    under, None where none are configured. `principal` sent it. `seconds` is what parsing and compiling took.
    Admission fills in the rest: `admitted` counts the engine requests that took a plan: zero after the reply
    began means that the route never reached admission, and that the reply must not pass for a steered one.
    `unmatched` counts, by intervention, those of them whose prompt and reply its window cannot match.
    `merged` is what they took, `ends` where each of them ended; `refused` is why admission did not take one.
    `model` is the first name of the model, or its LoRA's, that they were for; None until then. `keep` is told
    of the report where the reply can be read again. `left`: the client was gone before the end.
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
    ends: Ends = field(default_factory=Ends)
    refused: RequestError | None = None
    model: str | None = None
    keep: Callable[[dict[str, Any]], None] | None = None
    left: bool = False

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
