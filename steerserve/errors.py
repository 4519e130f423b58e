"""Every error that steerserve raises on purpose.

    SteerserveError
    ├── ConfigError            the operator's settings are wrong; the server does not start
    ├── CheckpointError        an SAE or direction on disk cannot be trusted or is not served
    ├── IncompatibleError      this vLLM, or this model, cannot be steered exactly
    ├── PolicyError            a policy document, or the set of them, cannot be enforced
    ├── KeyFileError           the file of keys cannot be read
    ├── AuditError             the audit log cannot be written, or was tampered with
    └── RequestError           a client's request is refused; HTTP 400
        ├── RouteError         this route, or this combination of options, cannot carry steering
        ├── UnauthenticatedError  no key, or none that is known; 401
        ├── ForbiddenError     this key may not; 403
        │   └── ConflictError  an enforced policy holds what the request wants to change; 403
        ├── MissingError       there is no such thing here; 404
        ├── ReadOnlyError      the folder cannot be written; 405
        ├── StaleError         what was to be replaced is not what was read; 412
        ├── TooManyError       this key has asked too often; 429
        └── UnavailableError   what must happen first, such as the audit, cannot; 503

Messages say what was expected, what came, and where:
``expected `feature` < 2048, got 70000 - at $.steering.interventions[2].feature``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "AuditError",
    "CheckpointError",
    "ConfigError",
    "ConflictError",
    "ForbiddenError",
    "IncompatibleError",
    "KeyFileError",
    "MissingError",
    "PolicyError",
    "ReadOnlyError",
    "RequestError",
    "RouteError",
    "StaleError",
    "SteerserveError",
    "TooManyError",
    "UnauthenticatedError",
    "UnavailableError",
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


class PolicyError(SteerserveError):
    """A policy document cannot be enforced. The message names the document and the field."""


class KeyFileError(SteerserveError):
    """The file of keys cannot be read. The message names the file and the entry."""


class AuditError(SteerserveError):
    """The audit log cannot be written, or a line of it is not what was written."""


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


class UnauthenticatedError(RequestError):
    """No key, or none that is known."""

    status = 401
    kind = "AuthenticationError"


class ForbiddenError(RequestError):
    """The key is known, and may not do this."""

    status = 403
    kind = "PermissionDeniedError"


class ConflictError(ForbiddenError):
    """An enforced policy holds what the request wants to change."""

    kind = "policy_conflict"


class MissingError(RequestError):
    """There is no such thing here."""

    status = 404
    kind = "NotFoundError"


class ReadOnlyError(RequestError):
    """The folder that the change would go to cannot be written."""

    status = 405
    kind = "MethodNotAllowedError"


class StaleError(RequestError):
    """What was to be replaced is not what the client has read."""

    status = 412
    kind = "PreconditionFailedError"


class TooManyError(RequestError):
    """The key has asked more often than it may."""

    status = 429
    kind = "RateLimitError"


class UnavailableError(RequestError):
    """What must happen before the request is served cannot happen now."""

    status = 503
    kind = "ServiceUnavailableError"


def json_path(parts: Sequence[str | int]) -> str:
    """``("steering", "interventions", 2)`` → ``$.steering.interventions[2]``."""
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
