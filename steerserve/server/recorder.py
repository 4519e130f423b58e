"""Puts on record what became of each request, and who changed what; refuses where that must be but cannot."""

from __future__ import annotations

import logging
import math
from typing import Literal

from starlette.datastructures import Headers
from starlette.types import Scope

from steerserve.access.principal import Principal
from steerserve.audit import AuditLog, PolicyUse, Record, Watched, trace_id_of
from steerserve.carried import Carried
from steerserve.catalog import Catalog
from steerserve.errors import AuditError, RequestError, UnavailableError
from steerserve.policy import Policy, PolicyChange
from steerserve.policy.enforcement import InForce
from steerserve.policy.outcome import aborted, tokens_touched, watched
from steerserve.report import Counts, TicketTally, is_incomplete
from steerserve.row import Row

from .guard import PRINCIPAL, principal_of
from .reply import SteeredReply
from .routing import path_of

__all__ = ["Recorder"]

logger = logging.getLogger(__name__)
# Of a request whose counts the workers did not give, or not those of what its client received.
INCOMPLETE = "incomplete"
Outcome = Literal["ok", "refused", "aborted", "failed", "left"]
# Seconds that a change waits for the disk to confirm its record.
_PATIENCE = 10.0


class Recorder:
    """The audit log as the server uses it; without one, nothing is recorded and nothing is refused.

    Args: log: None where no audit is configured. strict: whether requests under an enforced policy are
        refused while the log cannot be written.
    """

    def __init__(
        self, log: AuditLog | None = None, catalog: Catalog | None = None, *, strict: bool = True
    ) -> None:
        self.log = log
        self._catalog = catalog
        self._strict = strict

    @property
    def problem(self) -> str | None:
        """Why nothing can be recorded; None where it can, or need not be."""
        return self.log.problem if self.log is not None else None

    def check(self, carried: Carried) -> None:
        """Refuse a request that could not be put on record.

        Raises: UnavailableError.
        """
        if self._strict and self.problem is not None and _is_bound(carried):
            raise UnavailableError("expected to audit this request, and cannot now", at=(), reason="audit")

    async def served(self, scope: Scope, carried: Carried, tally: TicketTally | None) -> None:
        """A reply is about to end.

        Raises: UnavailableError if it may not, for it cannot be recorded.
        """
        if self.log is None or not carried.admitted:
            return
        outcome: Outcome = "left" if carried.left else "ok"
        if aborted(carried.merged, tally):
            outcome = "aborted"
        problem = await self._write(self._record(scope, carried, outcome, tally, status=200))
        if problem is not None and self._strict and carried.merged.enforced:
            message = "expected to audit this request, and could not"
            raise UnavailableError(message, at=(), reason="audit") from problem

    async def refused(self, scope: Scope, carried: Carried, error: RequestError) -> None:
        """A request was refused before the engine saw it."""
        await self._write(
            self._record(scope, carried, "refused", None, status=error.status, reason=error.reason)
        )

    async def ended(
        self, scope: Scope, carried: Carried, reply: SteeredReply, tally: TicketTally | None
    ) -> None:
        """A request ended that `served` was not told of: refused, failed, or its client left."""
        if reply.asked and not reply.refused:
            return
        if carried.refused is not None:
            await self.refused(scope, carried, carried.refused)
        elif carried.admitted or carried.own is not None:
            outcome: Outcome = "refused" if reply.refused else "left" if not reply.finished else "failed"
            await self._write(self._record(scope, carried, outcome, tally, status=reply.status))

    def changing(self, change: PolicyChange, principal: Principal | None) -> None:
        """A policy is about to be changed over HTTP. Waits for the disk: not for an event loop.

        Raises: UnavailableError if that cannot be recorded, and must then not be done.
        """
        detail = (
            f"{change.action} {change.old_version} -> {change.new_version}, sha256 {change.sha256}, "
            f"in force: {change.set_version}"
        )
        self._first(_of_change(change, principal, detail))

    def not_changed(self, change: PolicyChange, principal: Principal | None, error: Exception) -> None:
        """What `changing` recorded could not be done."""
        detail = f"not {change.action}, {change.old_version} stays: {error}"
        self._note(_of_change(change, principal, detail))

    def denied(self, scope: Scope, error: RequestError) -> None:
        """A request was turned away at the door; nobody waits until that is written."""
        headers = Headers(scope=scope)
        self._note(
            Record(
                event="request",
                request_id=headers.get("x-request-id"),
                trace_id=trace_id_of(headers.get("traceparent")),
                principal=principal_of(scope).name if PRINCIPAL in scope else None,
                route=path_of(scope),
                outcome="refused",
                status=error.status,
                reason=error.reason,
            )
        )

    def enforcing(self, in_force: InForce) -> None:
        """These policies are about to take force, for the folder changed or the server starts.

        Waits for the disk: not for an event loop.

        Raises: UnavailableError if that cannot be recorded, and must then not happen.
        """
        uses = tuple(_use(one.policy) for one in in_force.compiled.values())
        self._first(Record(event="policy", policies=uses, detail=f"in force: {in_force.version}"))

    def rekeying(self, detail: str) -> None:
        """These keys are about to count. Raises: as `enforcing`."""
        self._first(Record(event="keys", detail=detail))

    def _first(self, record: Record) -> None:
        """Written before what it tells of is done."""
        if self.log is None:
            return
        try:
            self.log.append(record).result(_PATIENCE)
        except (AuditError, TimeoutError) as error:
            why = str(error) or f"the disk did not answer within {_PATIENCE:g} s"
            message = f"expected to audit a change before it is made, and could not: {why}"
            raise UnavailableError(message, at=(), reason="audit") from error

    def _note(self, record: Record) -> None:
        if self.log is not None:
            self.log.append(record)

    def close(self) -> None:
        """Write what is queued."""
        if self.log is not None:
            self.log.close()

    async def _write(self, record: Record) -> AuditError | None:
        """Returns: why it is not on record; None where it is, or need not be."""
        if self.log is None:
            return None
        try:
            await self.log.written(record)
        except AuditError as error:
            logger.error("The audit log lacks a %s: %s", record.event, error)
            return error
        return None

    def _record(
        self,
        scope: Scope,
        carried: Carried,
        outcome: Outcome,
        tally: TicketTally | None,
        *,
        status: int | None,
        reason: str | None = None,
    ) -> Record:
        headers = Headers(scope=scope)
        plan = carried.merged.plan or carried.own
        if reason is None and carried.admitted and is_incomplete(tally, carried.admitted):
            reason = INCOMPLETE
        uses = tuple(_use(policy) for policy in carried.merged.policies)
        return Record(
            event="request",
            request_id=headers.get("x-request-id") or carried.ticket,
            trace_id=trace_id_of(headers.get("traceparent")),
            principal=principal_of(scope).name,
            route=path_of(scope),
            model=carried.model,
            outcome=outcome,
            status=status,
            reason=reason,
            plan=None if plan is None else plan.digest,
            policies=uses,
            saes=self._saes(carried),
            tokens=tokens_touched(carried.merged, tally),
            watched={
                f"{p.name}/{row.origin.watch}": _seen(row, c) for p, row, c in watched(carried.merged, tally)
            },
        )

    def _saes(self, carried: Carried) -> dict[str, str]:
        plan = carried.merged.plan or carried.own
        if plan is None or self._catalog is None:
            return {}
        used = {row.source: self._catalog.sources[row.source] for row in plan.rows}
        return {key: source.sha256 or source.fingerprint for key, source in used.items()}


def _is_bound(carried: Carried) -> bool:
    """Whether an enforced policy may be for the request; its model is not known yet."""
    compiled = carried.in_force.compiled.values() if carried.in_force is not None else ()
    return any(one.policy.mode == "enforce" for one in compiled)


def _of_change(change: PolicyChange, principal: Principal | None, detail: str) -> Record:
    version = change.new_version or change.old_version or 0
    return Record(
        event="policy",
        principal=None if principal is None else principal.name,
        policies=(PolicyUse(name=change.name, version=version, mode=change.mode or "off"),),
        detail=detail,
    )


def _use(policy: Policy) -> PolicyUse:
    return PolicyUse(name=policy.name, version=policy.version, mode=policy.mode)


def _seen(row: Row, counts: Counts) -> Watched:
    largest = counts.max_before if math.isfinite(counts.max_before) else None
    return Watched(tokens=counts.tokens, fired=counts.lowered, above=row.c, max=largest)
