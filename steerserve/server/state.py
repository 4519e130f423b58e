"""What the HTTP side knows of the engine once it is up."""

from __future__ import annotations

from dataclasses import dataclass

from steerserve.catalog import Catalog
from steerserve.report import Reporter

from .collector import ReportCollector

__all__ = ["SteeringState"]


@dataclass
class SteeringState:
    """Filled in when the engine is up; until then, and where nothing is configured, all steering is refused.

    `routes` are the app's routes that carry steering.
    """

    catalog: Catalog | None = None
    collector: ReportCollector | None = None
    reporter: Reporter | None = None
    model: str = ""
    vllm_version: str = ""
    routes: tuple[str, ...] = ()

    async def close(self) -> None:
        """Stop the background work."""
        if self.collector is not None:
            await self.collector.stop()
