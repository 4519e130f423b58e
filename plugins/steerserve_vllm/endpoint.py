"""steerserve's HTTP side inside vLLM's server: the `vllm.endpoint_plugins` entry point."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from vllm import __version__ as vllm_version

from steerserve.report import Reporter
from steerserve.server.collector import ReportCollector
from steerserve.server.middleware import SteeringMiddleware
from steerserve.server.routes import build_router
from steerserve.server.routing import served
from steerserve.server.state import SteeringState

from .setup import catalog_for

__all__ = ["SteeringEndpoints", "ask_workers"]

_COLLECT = "steerserve_collect"


class SteeringEndpoints:
    """vLLM's EndpointPlugin protocol. It serves the render-only server too, which has to refuse steering."""

    name = "steerserve"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the management routes and the middleware; vLLM adds its own later, hence outside of it."""
        state = SteeringState(routes=served(app.routes), vllm_version=vllm_version)
        app.state.steerserve = state
        app.include_router(build_router(state))
        app.add_middleware(SteeringMiddleware, state=state)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Connect the HTTP side to the engine, where there is one that steers.

        Raises: ConfigError or CheckpointError naming what cannot be served.
        """
        steering: SteeringState = state.steerserve
        names = args.served_model_name or [args.model]
        steering.model = names[0] if isinstance(names, list) else names
        if engine_client is None:
            return
        config = engine_client.vllm_config
        steering.catalog = catalog_for(config)
        if steering.catalog is None:
            return
        parallel = config.parallel_config
        steering.reporter = Reporter(steering.catalog)
        steering.collector = ReportCollector(
            ask_workers(engine_client),
            feeds_tokens=parallel._api_process_rank <= 0,
            several_servers=parallel._api_process_count > 1,
        )
        steering.collector.start()


def ask_workers(engine_client: Any) -> Any:
    """The call to every worker; of several replicas, `collective_rpc` gives the first one's answers alone."""
    several = engine_client.vllm_config.parallel_config.data_parallel_size > 1

    async def collect(tickets: list[str]) -> Iterable[Mapping[str, Any]]:
        if not several:
            replies: list[Mapping[str, Any]] = await engine_client.collective_rpc(_COLLECT, args=(tickets,))
            return replies
        everywhere = engine_client.engine_core.call_utility_all_async
        replicas = await everywhere("collective_rpc", _COLLECT, None, (tickets,), {})
        # Dense models' replicas all call themselves rank 0.
        return [
            {**reply, "dp_rank": rank} for rank, replica in enumerate(replicas) for reply in replica if reply
        ]

    return collect
