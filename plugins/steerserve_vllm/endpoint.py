"""steerserve's HTTP side inside vLLM's server: the `vllm.endpoint_plugins` entry point."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from vllm import __version__ as vllm_version
from vllm import envs

from steerserve.access.binding import check_binding
from steerserve.access.keyring import KeyRing
from steerserve.audit import AuditLog
from steerserve.catalog import Catalog
from steerserve.config import SteerserveConfig, parse_config
from steerserve.report import Reporter
from steerserve.server.collector import ReportCollector
from steerserve.server.guard import KeyGuard
from steerserve.server.middleware import SteeringMiddleware
from steerserve.server.recorder import Recorder
from steerserve.server.routes import build_router
from steerserve.server.routing import served
from steerserve.server.state import SteeringState

from .setup import catalog_for, enforcement_for

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
        # The last one added stands outermost: nobody passes the steering without passing the guard.
        app.add_middleware(KeyGuard, state=state)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Connect the HTTP side to the engine, where there is one that steers.

        Raises: ConfigError or CheckpointError naming what cannot be served.
        """
        steering: SteeringState = state.steerserve
        names = args.served_model_name or [args.model]
        steering.model = names[0] if isinstance(names, list) else names
        own = parse_config(args.additional_config)
        if own is not None:
            _guard(steering, own, args)
        if engine_client is None:
            return
        config = engine_client.vllm_config
        steering.catalog = catalog_for(config)
        if steering.catalog is None or own is None:
            return
        parallel = config.parallel_config
        steering.enforcement = enforcement_for(config)
        steering.models = lambda: _names(state.openai_serving_models)
        steering.recorder = _recorder(own, steering.catalog, max(0, parallel._api_process_rank))
        # Whatever takes force is on record first, what the server starts with included.
        if steering.enforcement is not None:
            steering.enforcement.folder.record = steering.recorder.enforcing
            steering.recorder.enforcing(steering.enforcement.folder.enforced)
        if steering.keys is not None:
            steering.keys.record = steering.recorder.rekeying
            steering.recorder.rekeying(steering.keys.summary)
        steering.reporter = Reporter(steering.catalog)
        steering.collector = ReportCollector(
            ask_workers(engine_client),
            feeds_tokens=parallel._api_process_rank <= 0,
            several_servers=parallel._api_process_count > 1,
        )
        steering.start()


def _guard(state: SteeringState, config: SteerserveConfig, args: Namespace) -> None:
    """Keys, and whether the server may be reached from where it listens.

    Raises: ConfigError or KeyFileError.
    """
    state.server_keys = tuple(key for key in (args.api_key or [envs.VLLM_API_KEY]) if key)
    guarded = config.keys is not None or bool(state.server_keys)
    check_binding(args.host, args.uds, guarded=guarded, open_to_all=config.open_to_all)
    if config.keys is not None:
        state.keys = KeyRing(config.keys)


def _names(models: Any) -> list[str]:
    """Of the model and of the LoRAs that are loaded now."""
    return [*(path.name for path in models.base_model_paths), *models.lora_requests]


def _recorder(config: SteerserveConfig, catalog: Catalog, rank: int) -> Recorder:
    """Of this process, which writes a chain of its own.

    Raises: AuditError if the log cannot be written.
    """
    if config.audit is None:
        return Recorder()
    log = AuditLog(config.audit.folder, f"audit-{rank}", key=config.audit.signing_key)
    return Recorder(log, catalog, strict=config.audit.on_failure == "refuse")


def ask_workers(engine_client: Any) -> Any:
    """The call to every worker; of several replicas, `collective_rpc` gives the first one's answers alone."""
    several = engine_client.vllm_config.parallel_config.data_parallel_size > 1

    async def collect(tickets: dict[str, dict[str, int]]) -> Iterable[Mapping[str, Any]]:
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
