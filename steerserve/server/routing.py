"""Which routes carry steering, and what may stand beside it in their bodies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from steerserve.errors import RouteError

__all__ = ["CARRYING", "check_options", "check_route", "path_of", "served"]

# Every route of vLLM that generates. A route that is not here refuses steering; one that is here and then
# does not reach admission has its reply refused.
CARRYING = (
    "/cohere/v2/chat",
    "/generative_scoring",
    "/inference/v1/generate",
    "/invocations",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
    "/v1/systemone",
)

# Options under which the engine's prompts are not the client's, or the reply comes before admission.
_ALONE = {
    "use_beam_search": "beam search prompts the engine anew for each token, so positions lose their meaning",
    "prompt_embeds": "embeddings have no token ids to select by",
    "background": "a background reply is sent before its request is admitted",
}


def path_of(scope: Scope) -> str:
    """The path that routes are matched against: without the prefix that the server is mounted under."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    # As it stands first, for that is what the router takes off, be there a slash behind it or not.
    for prefix in (root, root.rstrip("/")):
        if prefix and (path == prefix or path.startswith(prefix + "/")):
            return path[len(prefix) :]
    return path


def served(routes: Iterable[BaseRoute]) -> tuple[str, ...]:
    """The carrying routes among those of an app."""
    known = tuple(routes)
    return tuple(path for path in CARRYING if any(_takes_post(route, path) for route in known))


def check_route(path: str) -> None:
    """Refuse a route that cannot carry steering.

    Raises: RouteError.
    """
    if path not in CARRYING:
        message = f"expected no `steering` on `{path[:128]}`, which cannot carry it"
        raise RouteError(message, reason="route")


def check_options(rest: Mapping[str, Any]) -> None:
    """Refuse what cannot be combined with steering.

    Args: rest: the body's other fields.
    Raises: RouteError naming the field.
    """
    for name, why in _ALONE.items():
        if rest.get(name) not in (None, False):
            message = f"expected no `{name}` beside `steering`: {why}"
            raise RouteError(message, at=(name,), reason="combination")


def _takes_post(route: BaseRoute, path: str) -> bool:
    match, _ = route.matches({"type": "http", "method": "POST", "path": path, "headers": []})
    return match is Match.FULL
