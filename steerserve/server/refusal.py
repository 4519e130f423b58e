"""A refused request's reply."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from steerserve.errors import RequestError

__all__ = ["refusal"]


def refusal(error: RequestError, path: str) -> JSONResponse:
    """The error in OpenAI's shape, and in that of the route's own API where that one differs.

    Anthropic's clients want `"type": "error"` beside `error`, Cohere's want a `message`.
    """
    message = str(error)
    details = {"message": message, "type": error.kind, "param": error.param, "code": error.status}
    body: dict[str, Any] = {"error": details}
    if path == "/v1/messages":
        body["type"] = "error"
    if path.startswith("/cohere/"):
        body["message"] = message
    return JSONResponse(body, status_code=error.status)
