"""What an operator watches of keys, on the default registry. Labels are the slugs of errors, never names."""

from __future__ import annotations

from prometheus_client import Counter

__all__ = ["count_failed_reload", "count_refusal"]

_refusals = Counter("steerserve_key_refusals", "Requests refused for want of a key or a right.", ["reason"])
_failed_reloads = Counter(
    "steerserve_key_file_failures", "Changes of the key file that could not be read; the last good one holds."
)


def count_refusal(reason: str) -> None:
    """One request was refused; `reason` is the slug of its RequestError."""
    _refusals.labels(reason=reason).inc()


def count_failed_reload() -> None:
    """The key file changed to something that cannot be used."""
    _failed_reloads.inc()
