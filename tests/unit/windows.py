"""Windows as requests write them, at random."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

__all__ = ["wheres"]


def wheres(
    position: st.SearchStrategy[int], token: st.SearchStrategy[int], most: int
) -> st.SearchStrategy[dict[str, Any]]:
    """`where` of an intervention. Args: most: entries of each of its lists."""
    return st.fixed_dictionaries(
        {},
        optional={
            "phase": st.sampled_from(["all", "prompt", "generation"]),
            "start": position,
            "stop": position,
            "positions": st.lists(position, min_size=1, max_size=most),
            "tokens": st.lists(token, min_size=1, max_size=most),
            "exclude_positions": st.lists(position, max_size=most),
            "exclude_tokens": st.lists(token, max_size=most),
            "special_tokens": st.booleans(),
        },
    )
