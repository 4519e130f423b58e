"""Prefix-cache keys: a block of KV is shared exactly where the same rows applied to the same positions.

A block's key takes the plan's digest and the row masks of its tokens, if any is set. Blocks before the first
touched position, and prompts that no row touches, keep vLLM's own keys and are shared with unsteered
requests. A special token that ends the prompt is steered where the same token within a longer prompt is not,
so the block that holds it is the prompt's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from steerserve.plan import Plan
from steerserve.window import Selector

from .admission import ends_special, plan_of
from .seams import wrap

__all__ = ["install"]

_ATTRIBUTE = "_steerserve_selector"
# Whether a token is special follows from its id, which is in the block's hash already.
_NONE_SPECIAL = np.zeros(1, dtype=np.bool_)


def install() -> None:
    """Wrap the function that adds extra keys to block hashes, wherever vLLM holds it by name."""
    wrap("block_keys", _wrap_block_keys)
    wrap("block_keys_pool", _wrap_block_keys)


def _wrap_block_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(original, "__wrapped__"):
        return original

    def block_keys(request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
        keys, mm_index = original(request, start_token_idx, end_token_idx, start_mm_idx)
        admitted = plan_of(request.sampling_params)
        if admitted is None:
            return keys, mm_index
        own = _steering_key(request, admitted[0], start_token_idx, end_token_idx)
        return ((*(keys or ()), own) if own else keys), mm_index

    return block_keys


def _steering_key(request: Any, wire: list[Any], start: int, end: int) -> tuple[str, str] | None:
    selector: Selector | None = getattr(request, _ATTRIBUTE, None)
    if selector is None:
        selector = Plan.from_wire(wire).selector(request.num_prompt_tokens)
        setattr(request, _ATTRIBUTE, selector)
    tokens = np.asarray(request.all_token_ids[start:end], dtype=np.int64)
    masks = selector.masks(start, tokens, _NONE_SPECIAL)
    if not masks.any():
        return None
    return "steerserve", f"{wire[0]}:{masks.tobytes().hex()}{_end(request, selector, start, end)}"


def _end(request: Any, selector: Selector, start: int, end: int) -> str:
    """What a special token that ends the prompt has of the rows; empty where the block has none."""
    last = request.num_prompt_tokens - 1
    if not (start <= last < end and ends_special(request.sampling_params)):
        return ""
    piece = int(np.searchsorted(selector.starts, last, side="right")) - 1
    return f":{int(selector.special_ok[piece]):x}"
