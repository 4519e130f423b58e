"""The policies in force: what each of them adds to a request, and what it forbids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from steerserve.catalog import Catalog
from steerserve.errors import ConflictError, RequestError, RouteError
from steerserve.layout import MAX_BITS, Bits
from steerserve.plan import Plan, build_plan
from steerserve.row import Row

from .compiled import CompiledPolicy, check_policies, distinct
from .document import Policy
from .folder import PolicyFolder
from .policy_set import PolicySet

__all__ = ["Applying", "Caller", "Enforcement", "InForce", "Merged"]

# Callers whose policies are remembered.
_MOST_CALLERS = 128


@dataclass(frozen=True)
class Caller:
    """What decides which policies a request is under. Offline there is neither route nor key.

    `models` are all names of the model that serves it: its policies are those of each of them.
    """

    models: tuple[str, ...] = ()
    route: str | None = None
    scopes: frozenset[str] = frozenset()
    key: str | None = None


@dataclass(frozen=True)
class Merged:
    """A request's plan under the policies that are for it; None where neither asks for anything."""

    plan: Plan | None
    compiled: tuple[CompiledPolicy, ...] = ()

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The policies that are for the request, in the order of their names."""
        return tuple(one.policy for one in self.compiled)

    @property
    def enforced(self) -> bool:
        """Whether any of the policies is more than a shadow."""
        return any(policy.mode == "enforce" for policy in self.policies)


@dataclass(frozen=True)
class Applying:
    """The policies for one caller, in the order of their names, and all that each request needs of them.

    `holders` says of each feature that they change which of them does; `alone` is what becomes of a
    request that asks for nothing.
    """

    compiled: tuple[CompiledPolicy, ...]
    rows: tuple[Row, ...]
    holders: dict[tuple[str, int], Policy]
    alone: Merged

    @classmethod
    def of(cls, compiled: Iterable[CompiledPolicy], catalog: Catalog) -> Applying:
        """Of these, whose rows agree with each other."""
        found = tuple(compiled)
        holders = {place: one.policy for one in reversed(found) for place in one.applied}
        rows = tuple(distinct(row for one in found for row in one.rows))
        alone = Merged(build_plan(rows, catalog), found) if found else Merged(None)
        return cls(found, rows, holders, alone)


@dataclass(frozen=True)
class InForce:
    """One version of all policies, compiled; a request keeps the one that it began under."""

    version: str
    compiled: dict[str, CompiledPolicy]
    catalog: Catalog

    def applying(self, caller: Caller) -> Applying:
        """The policies for this caller."""
        return self._applying(caller)

    @cached_property
    def _applying(self) -> Callable[[Caller], Applying]:
        """Remembers its answers; functools' cache, unlike a dict of our own, is safe in several threads."""

        def find(caller: Caller) -> Applying:
            found = (one for one in self.compiled.values() if _is_for(one.policy, caller))
            return Applying.of(found, self.catalog)

        return lru_cache(maxsize=_MOST_CALLERS)(find)

    def merge(self, own: Plan | None, caller: Caller) -> Merged:
        """The plan of a request.

        Args: own: what the request itself asks for; None if nothing.
        Raises: ConflictError if it changes what an enforced policy changes; RequestError if both together
            need more windows than a token's mask has bits.
        """
        applying = self.applying(caller)
        if own is None:
            return applying.alone
        # Not remembered: what is kept is what the garbage collector walks over, in somebody's request.
        return self._merged(own, applying) if applying.compiled else Merged(own)

    @cached_property
    def depends_on_position(self) -> bool:
        """Whether any policy means something else where a request is cut into several."""
        rows = (row for one in self.compiled.values() for row in one.rows)
        return any(row.is_stateful or not row.window.is_everywhere for row in rows)

    def check_beams(self) -> None:
        """Refuse beam search where a policy depends on positions: each token of a beam is a new prompt.

        Raises: RouteError.
        """
        if self.depends_on_position:
            message = (
                "expected no `use_beam_search`: a policy in force depends on positions, which beams lose"
            )
            raise RouteError(message, at=("use_beam_search",), reason="combination")

    def _merged(self, own: Plan, applying: Applying) -> Merged:
        _check_conflict(own.rows, applying)
        rows = [*own.rows, *applying.rows]
        windows = len(Bits.of(rows).windows)
        if windows > MAX_BITS:
            message = f"expected at most {MAX_BITS} different windows beside those of policies, got {windows}"
            raise RequestError(message, at=("steering", "interventions"), reason="too_many")
        return Merged(build_plan(rows, self.catalog, own.drop), applying.compiled)


class Enforcement:
    """The policies of a folder, compiled before any of them takes force, and once.

    Args: path: the folder. catalog: what is served. routes: the routes that generate, where they are known.
        every: seconds between two looks at the folder.
    Raises: PolicyError if the folder cannot be enforced as it is: the server must not start.
    """

    def __init__(
        self, path: Path, catalog: Catalog, routes: Collection[str] | None = None, *, every: float = 0.5
    ) -> None:

        def compiled(policies: Sequence[Policy]) -> InForce:
            found = check_policies(policies, catalog, routes)
            return InForce(PolicySet.of(policies).version, found, catalog)

        self.folder: PolicyFolder[InForce] = PolicyFolder(path, compiled, every=every)

    def current(self) -> InForce:
        """The policies in force now. Reads the folder where that is due: not for an event loop."""
        self.folder.look()
        return self.folder.enforced

    async def current_async(self) -> InForce:
        """The same, for an event loop: what reads the disk does so in a thread."""
        if self.folder.is_due:
            await asyncio.to_thread(self.folder.look)
        return self.folder.enforced


def _is_for(policy: Policy, caller: Caller) -> bool:
    return any(
        policy.applies.match(model, caller.route, caller.scopes, caller.key)
        for model in caller.models or (None,)
    )


def _check_conflict(own: Sequence[Row], applying: Applying) -> None:
    for row in own:
        holder = applying.holders.get((row.source, row.feature)) if row.applies else None
        if holder is not None:
            message = (
                f"expected no change to {row.source.partition(':')[2]} {row.feature}, which policy "
                f"`{holder.name}` holds: {holder.reason}"
            )
            at = ("steering", "interventions", row.origin.index)
            raise ConflictError(message, at=at, reason="policy_conflict")
