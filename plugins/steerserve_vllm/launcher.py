"""A configured server never starts without its HTTP side: `steering` in a body would be dropped silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steerserve.config import parse_config
from steerserve.errors import ConfigError

from .seams import wrap

__all__ = ["install"]


def install() -> None:
    """Wrap the attachment of endpoint plugins."""
    wrap("attach_endpoints", _wrap_attach)


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
