"""What an operator watches of the audit log. The label is the log's prefix, one for each API server."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

__all__ = ["failures", "healthy", "lines", "write_seconds"]

_BUCKETS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 5.0)

lines = Counter("steerserve_audit_lines", "Records written to the audit log.", ["log"])
failures = Counter("steerserve_audit_failures", "Records that could not be written.", ["log"])
healthy = Gauge(
    "steerserve_audit_healthy",
    "1 while the audit log can be written, 0 once it cannot.",
    ["log"],
    multiprocess_mode="mostrecent",
)
write_seconds = Histogram(
    "steerserve_audit_write_seconds", "Time to write one batch of records.", ["log"], buckets=_BUCKETS
)
