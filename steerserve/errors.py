"""Every error that steerserve raises on purpose.

    SteerserveError
    ├── ConfigError            the operator's settings are wrong; the server does not start
    ├── CheckpointError        an SAE or direction on disk cannot be trusted or is not served
    ├── IncompatibleError      this vLLM, or this model, cannot be steered exactly
    └── RequestError           a client's request is refused; HTTP 400
        └── RouteError         this route, or this combination of options, cannot carry steering

Messages say what was expected, what came, and where:
``expected `feature` < 2048, got 70000 - at $.steering.interventions[2].feature``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "CheckpointError",
    "ConfigError",
    "IncompatibleError",
    "RequestError",
    "RouteError",
    "SteerserveError",
    "json_path",
]


class SteerserveError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(SteerserveError):
    """The operator's settings are wrong. Raised at start-up only."""


class CheckpointError(SteerserveError):
    """A file on disk cannot be served: damaged, untrusted, or of a kind that is not served exactly.

    Args:
        message: what was expected and what came.
        path: the offending file.
        tensor: the offending tensor inside it, if one is known.
    """

    def __init__(self, message: str, *, path: Path | str, tensor: str | None = None) -> None:
        self.path = Path(path)
        self.tensor = tensor
        where = f"{path}" if tensor is None else f"{path}, tensor `{tensor}`"
        super().__init__(f"{message} - in {where}")


class IncompatibleError(SteerserveError):
    """This vLLM or this model cannot be steered exactly; nothing was patched."""


class RequestError(SteerserveError):
    """A client's request is refused.

    Args:
        message: what was expected and what came, without the place.
        at: path into the body, e.g. ``("steering", "interventions", 2, "feature")``.
        reason: a short slug, the label of the rejection counter.
    """

    status = 400
    kind = "BadRequestError"

    def __init__(
        self, message: str, *, at: Sequence[str | int] = ("steering",), reason: str = "malformed"
    ) -> None:
        self.at = tuple(at)
        self.reason = reason
        self.param = json_path(self.at)
        super().__init__(f"{message} - at {self.param}")


class RouteError(RequestError):
    """This route, or an option beside `steering`, cannot be combined with steering."""


def json_path(parts: Sequence[str | int]) -> str:
    """``("steering", "interventions", 2)`` → ``$.steering.interventions[2]``."""
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
