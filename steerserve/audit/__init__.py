"""The audit log: who asked for what and what became of it, in a chain of lines that cannot change unseen."""

from .chain import Head
from .record import PolicyUse, Record, Watched, trace_id_of
from .verify import Verdict, verify
from .writer import AuditLog

__all__ = ["AuditLog", "Head", "PolicyUse", "Record", "Verdict", "Watched", "trace_id_of", "verify"]
