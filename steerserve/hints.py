"""What somebody meant who wrote a key that is not known: other tools' words, near misses, the wrong place."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

__all__ = ["hint_for"]

_WHERE = (
    *("phase", "start", "stop", "positions", "tokens"),
    *("exclude_positions", "exclude_tokens", "special_tokens"),
)
_INTERVENTION = (
    *(
        "sae",
        "feature",
        "direction",
        "op",
        "value",
        "unit",
        "only_if_active",
        "where",
        "when",
        "latch",
        "then",
    ),
)
_TOP = ("interventions", "error", "report")
_CONDITION = ("feature", "sae", "above", "below")

# By the list or object that a key stands in.
_KNOWN = {
    "interventions": _INTERVENTION,
    "where": _WHERE,
    "when": _CONDITION,
    "watch": ("name", "sae", "feature", "direction", "above", "where", "when"),
    "applies": ("scopes", "models", "routes"),
}
# What papers, other libraries and other servers call it.
_MEANT = {
    "value": (
        *("strength", "coefficient", "coeff", "coef", "multiplier", "amount", "magnitude", "factor", "alpha"),
        *("intensity", "weight", "steering_strength", "steering_coefficient", "target", "level", "by", "to"),
    ),
    "sae": (
        *("layer", "layers", "hook", "hook_point", "hook_name", "site", "sae_id", "sae_name", "sae_path"),
        *("release", "source", "dictionary", "module"),
    ),
    "feature": (
        *("index", "idx", "id", "feature_id", "feature_index", "feature_idx", "features", "latent", "neuron"),
        *("latent_index", "neuron_index", "label", "concept"),
    ),
    "direction": ("vector", "steering_vector", "control_vector", "vectors"),
    "op": ("operation", "operator", "type", "mode", "method", "action", "kind", "intervention"),
    "unit": ("units", "scale", "relative", "normalized", "normalised"),
    "only_if_active": ("active", "if_active", "only_active"),
    "when": ("condition", "conditions", "if", "only_if", "gate", "trigger"),
    "then": ("abort", "on_match"),
    "interventions": ("edits", "features", "interventions_list", "steer", "steering", "vectors", "changes"),
    "above": ("threshold", "min", "minimum", "gt", "greater_than", "over"),
    "below": ("max", "maximum", "lt", "less_than", "under"),
    "positions": ("position", "indices", "token_positions"),
    "tokens": ("token", "token_ids", "ids"),
    "start": ("from", "begin", "first"),
    "stop": ("end", "until", "last"),
    "special_tokens": ("special", "include_special_tokens", "bos"),
}


# As like as one letter too many or too few.
_NEARLY = 0.85


def hint_for(path: Sequence[str | int], top: Collection[str] = _TOP) -> str:
    """What was meant by the unknown key at the end of a path; empty where nobody can tell.

    Args:
        path: from the top of the object, e.g. ``("interventions", 0, "strength")``.
        top: the keys at the top of it.
    """
    parent = next((part for part in reversed(path[:-1]) if isinstance(part, str)), "")
    known, key = _KNOWN.get(parent, ()) if parent else top, str(path[-1]).lower()
    meant = next((name for name in known if key in _MEANT.get(name, ()) or key == name), None)
    if meant is not None:
        why = ", which stands at a layer of its own" if meant == "sae" else ""
        return f"; did you mean `{meant}`{why}?"
    if close := difflib.get_close_matches(key, known, n=1, cutoff=_NEARLY):
        return f"; did you mean `{close[0]}`?"
    if (place := _place_of(key, parent, top)) is not None:
        said = next((name for name in _INTERVENTION if key in _MEANT.get(name, ())), key)
        return f"; `{said}` belongs {place}"
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _place_of(key: str, parent: str, top: Collection[str]) -> str | None:
    """Where a key that is known elsewhere belongs."""
    if parent == "interventions" and key in _TOP and key in top:
        return "beside `interventions`"
    if parent in ("interventions", "watch") and key in _WHERE:
        return "in `where`"
    if parent in ("interventions", "watch") and key in _CONDITION:
        return "in `when`"
    if parent in ("where", "when") and key in _INTERVENTION:
        return f"beside `{parent}`"
    meant = {word for name in _INTERVENTION for word in (name, *_MEANT.get(name, ()))}
    if parent == "" and (key in meant or key in _WHERE):
        return "in an entry of `interventions`"
    return None
