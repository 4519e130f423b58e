"""Policies: changes and watches that a safety team sets, by document, whatever a request asks for."""

from .document import Applies, Policy, Watch, parse_policy
from .folder import PolicyChange, PolicyFolder
from .known_names import KnownNames
from .policy_set import PolicySet

__all__ = [
    "Applies",
    "KnownNames",
    "Policy",
    "PolicyChange",
    "PolicyFolder",
    "PolicySet",
    "Watch",
    "parse_policy",
]
