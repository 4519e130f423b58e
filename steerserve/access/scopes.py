"""Which scope a route needs. What is not listed here needs `admin`: a route that is new to us stays shut.

Paths are compared whole, as the router gets them. Starlette's patterns end in `$`, so a path with a line feed
behind it reaches the same route: a rule by prefix, with exceptions, would be walked round by it.
"""

from __future__ import annotations

import re

from .principal import ScopeName

__all__ = ["required_scope", "runs_model"]

_READS = ("GET", "HEAD")
_OPEN = frozenset({"/health", "/load", "/metrics", "/ping", "/version"})
_DOCUMENTS = frozenset({"/docs", "/openapi.json", "/redoc"})
_STEERING = "/v1/steering"
_RUNS_MODEL = frozenset(
    {
        "/classify",
        "/cohere/v2/chat",
        "/generative_scoring",
        "/inference/v1/generate",
        "/invocations",
        "/pooling",
        "/rerank",
        "/score",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/rerank",
        "/v1/responses",
        "/v1/score",
        "/v1/systemone",
        "/v2/embed",
        "/v2/rerank",
    }
)
_PREPARES = frozenset(
    {
        "/cohere/v2/chat/render",
        "/detokenize",
        "/tokenize",
        "/v1/chat/completions/derender",
        "/v1/chat/completions/render",
        "/v1/completions/derender",
        "/v1/completions/render",
        "/v1/messages/count_tokens",
        "/v1/messages/render",
        "/v1/responses/render",
    }
)
_RESPONSE = re.compile(r"/v1/responses/[A-Za-z0-9_-]+")
_CANCEL = re.compile(r"/v1/responses/[A-Za-z0-9_-]+/cancel")


def required_scope(method: str, path: str) -> ScopeName | None:
    """The scope that a request needs; None where it is open to everyone.

    Args:
        method: as it came; methods are upper case.
        path: as the router gets it (`steerserve.server.routing.path_of`), not normalised.
    """
    if method == "OPTIONS":
        # A browser asks before it sends the key, and the answer holds nothing but methods and headers.
        return None
    if method in _READS:
        return _to_read(path)
    if method == "POST" and (path in _RUNS_MODEL or path in _PREPARES or _CANCEL.fullmatch(path)):
        return "infer"
    return "admin"


def runs_model(method: str, path: str) -> bool:
    """Whether a request costs the engine, so that the key's rate limit counts it."""
    return method == "POST" and path in _RUNS_MODEL


def _to_read(path: str) -> ScopeName | None:
    if path in _OPEN:
        return None
    if path == _STEERING or path.startswith(_STEERING + "/") or path in _DOCUMENTS:
        return "inspect"
    if path == "/v1/models" or _RESPONSE.fullmatch(path):
        return "infer"
    return "admin"
