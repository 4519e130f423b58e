"""What the HTTP side knows of the engine once it is up, and of who may ask it what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from starlette.types import Scope

from steerserve.access.keyring import KeyRing
from steerserve.access.principal import Principal
from steerserve.catalog import Catalog
from steerserve.errors import RequestError
from steerserve.policy import KnownNames, PolicyChange, PolicyFolder
from steerserve.policy.enforcement import Enforcement, InForce
from steerserve.report import Reporter

from .collector import ReportCollector
from .recorder import Recorder

__all__ = ["SteeringState"]


# Oftener than a request would look, so that no request waits for a disk.
_LOOK_EVERY = 0.2


@dataclass
class SteeringState:
    """Filled in when the engine is up; until then, and where nothing is configured, all steering is refused.

    `routes` are the app's routes that carry steering, `models` the names of the model and its LoRAs now.
    `keys` and `server_keys` say who may ask, `enforcement` holds the policies, `recorder` the audit log.
    """

    catalog: Catalog | None = None
    collector: ReportCollector | None = None
    reporter: Reporter | None = None
    enforcement: Enforcement | None = None
    recorder: Recorder = field(default_factory=Recorder)
    keys: KeyRing | None = None
    server_keys: tuple[str, ...] = ()
    model: str = ""
    vllm_version: str = ""
    routes: tuple[str, ...] = ()
    models: Callable[[], Collection[str]] | None = None
    _following: asyncio.Task[None] | None = None

    @property
    def policies(self) -> PolicyFolder[InForce] | None:
        """The folder of policies; None where none is configured."""
        return self.enforcement.folder if self.enforcement is not None else None

    @property
    def names(self) -> KnownNames:
        """The names that requests can have now."""
        models = self.models() if self.models is not None else None
        return KnownNames(models, self.keys.names if self.keys is not None else ())

    @property
    def is_guarded(self) -> bool:
        """Whether a request that asks for nothing is of interest all the same."""
        return self.enforcement is not None or self.keys is not None

    def denied(self, scope: Scope, error: RequestError) -> None:
        """Put on record that a request was turned away at the door."""
        self.recorder.denied(scope, error)

    def record_change(self, change: PolicyChange, principal: Principal | None) -> None:
        """Put a policy on record that is about to be changed.

        Raises: UnavailableError if that cannot be done.
        """
        self.recorder.changing(change, principal)

    def record_failure(self, change: PolicyChange, principal: Principal | None, error: Exception) -> None:
        """Put on record that a change was not made after all."""
        self.recorder.not_changed(change, principal, error)

    def start(self) -> None:
        """Begin the background work, on the running loop."""
        if self.collector is not None:
            self.collector.start()
        if self.enforcement is not None:
            self._following = asyncio.create_task(_follow(self.enforcement))

    async def close(self) -> None:
        """Stop the background work, and close the audit log."""
        if self._following is not None:
            self._following.cancel()
        if self.collector is not None:
            await self.collector.stop()
        await asyncio.to_thread(self.recorder.close)


async def _follow(enforcement: Enforcement) -> None:
    """Look for changed policies in a thread, for the folder may lie on a network."""
    while True:
        await asyncio.sleep(_LOOK_EVERY)
        await asyncio.to_thread(enforcement.current)
