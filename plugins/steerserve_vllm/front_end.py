"""A configured front end never drops `steering`: not without our HTTP side, and not in a batch file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from steerserve.carried import CARRIED, Carried
from steerserve.config import parse_config
from steerserve.errors import ConfigError
from steerserve.metrics import count_rejection
from steerserve.policy.enforcement import Caller

from . import batch, ending_shown, offline
from .seams import FRONT_END_SEAMS, check, wrap

__all__ = ["install"]

# Imported by whoever starts that server, and by nobody else.
_GRPC = "vllm.entrypoints.launchers.grpc_server"
_installed = False


def install() -> None:
    """Wrap what only a front end has. Called where a configured engine is set up; harmless when called again.

    Raises: ConfigError where gRPC is served;
        IncompatibleError if this vLLM's front end is not the one that the wrappers were written for.
    """
    global _installed
    if _installed:
        return
    if _GRPC in sys.modules:
        raise ConfigError(
            "expected the HTTP server: vLLM's gRPC one knows neither keys nor routes nor the audit log"
        )
    check(FRONT_END_SEAMS)
    wrap("attach_endpoints", _wrap_attach)
    wrap("run_batch_request", _wrap_run_request)
    batch.install()
    offline.install()
    ending_shown.install()
    _installed = True


def _wrap_attach(original: Callable[..., Any]) -> Callable[..., Any]:
    def attach(app: Any, supported_tasks: Any) -> None:
        original(app, supported_tasks)
        configured = parse_config(getattr(app.state.args, "additional_config", None)) is not None
        if configured and not getattr(app.state, "steerserve", None):
            raise ConfigError(
                "steerserve is configured, but its endpoint plugin was not loaded: set VLLM_PLUGINS="
                "steerserve (or add it to the list that is set), or start with `steerserve serve`"
            )

    return attach


def _wrap_run_request(original: Callable[..., Any]) -> Callable[..., Any]:
    # vLLM 0.32 hands over what counts the lines that are done; later ones count them where they call this.
    async def run_request(serving_engine_func: Any, request: Any, *trackers: Any) -> Any:
        error = batch.refusal_of(request)
        if error is None:
            # Policies for a route hold for a line of a batch file that names it.
            carried = Carried(caller=Caller(route=request.url))
            token = CARRIED.set(carried)
            try:
                output = await original(serving_engine_func, request, *trackers)
            finally:
                CARRIED.reset(token)
            # Not at the top: it is for the HTTP server too, which imports it by itself.
            from .batch_reports import add_report

            await add_report(output, serving_engine_func, carried)
            return output
        from vllm.entrypoints.launchers.run_batch import make_error_request_output

        count_rejection(error.reason)
        for tracker in trackers:
            tracker.completed()
        return make_error_request_output(request, error_msg=str(error))

    return run_request
