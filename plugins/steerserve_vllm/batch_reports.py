"""Reports in the output of a batch file, whose lines come past no HTTP side of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steerserve.carried import Carried
from steerserve.report import Reporter
from steerserve.server.collector import ReportCollector
from steerserve.server.reporting import report_of

from .endpoint import ask_workers
from .setup import catalog_for

__all__ = ["add_report"]

# By engine: a batch file has one.
_asked: dict[int, tuple[ReportCollector, Reporter]] = {}


async def add_report(output: Any, serve: Callable[..., Any], carried: Carried) -> None:
    """Put the report of a line into the body of its output, as a reply has it, where one is wanted.

    Args: serve: the method of vLLM's that served the line.
    """
    body = output.response.body if output.response is not None else None
    if body is None or not carried.admitted or not carried.wants_report:
        return
    collector, reporter = _of_engine(serve.__self__.engine_client)  # type: ignore[attr-defined]
    report = report_of(carried, reporter, await collector.collect(carried.ticket, carried.ends.known))
    if report is not None:
        body.steering = report


def _of_engine(engine: Any) -> tuple[ReportCollector, Reporter]:
    if id(engine) not in _asked:
        catalog = catalog_for(engine.vllm_config)
        assert catalog is not None
        _asked[id(engine)] = ReportCollector(ask_workers(engine)), Reporter(catalog)
    return _asked[id(engine)]
