"""Names that mean us where a configured engine reads none, whatever way a request came by.

An engine that serves nothing minds only the exact key in its parameters: others' names are not its business.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from steerserve.errors import RouteError
from steerserve.server.places import FIELD, check_names

__all__ = ["check_params", "check_prompt", "check_settings"]

# All else that a prompt holds is content.
_KWARGS = "mm_processor_kwargs"


def check_params(processor: Any, params: Any, known: Collection[str] = ()) -> None:
    """Refuse what parameters hold beside what is read of them.

    Args: known: the keys of `extra_args` that are read.
    Raises: RouteError naming the place.
    """
    extras = getattr(params, "extra_kwargs", None) or {}
    if FIELD in extras:
        raise RouteError(f"expected no `{FIELD}` in `extra_kwargs`, which nothing reads", reason="route")
    if not _is_configured(processor):
        return
    extra = getattr(params, "extra_args", None) or {}
    rest = {key: value for key, value in extra.items() if key not in known}
    check_names(rest, ("extra_args",))
    check_names(extras, ("extra_kwargs",))
    # vLLM's parameters take whatever attribute they are given.
    check_names(dict.fromkeys(getattr(params, "__dict__", ())), ("sampling_params",))


def check_prompt(processor: Any, prompt: Any) -> None:
    """Refuse what a prompt holds beside what vLLM reads of it.

    Raises: RouteError naming the place.
    """
    if isinstance(prompt, dict) and _is_configured(processor):
        names: dict[str, object] = dict.fromkeys(prompt)
        check_names({**names, _KWARGS: prompt.get(_KWARGS)}, ("prompts",))


def check_settings(processor: Any, settings: dict[str, Any], route: str = "") -> None:
    """Refuse names in settings that are handed to a template, a tokenizer or a processor.

    Args: route: the one whose bodies have these settings as fields.
    Raises: RouteError naming the place.
    """
    if _is_configured(processor):
        check_names(settings, (), route)


def _is_configured(processor: Any) -> bool:
    return processor._steerserve_catalog is not None
