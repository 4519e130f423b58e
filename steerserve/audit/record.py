"""One entry of the audit log: who asked for what, what became of it, and never a word of any text."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = ["PolicyUse", "Record", "Watched", "as_name", "trace_id_of", "utc_now"]

MAX_DETAIL = 256
MAX_ENTRIES = 1024

_NAME = re.compile(r"[A-Za-z0-9/$][A-Za-z0-9._:/@$+\[\]-]{0,127}")
_UNPRINTABLE = re.compile(r"[^ -~]")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?", re.ASCII)


def utc_now() -> str:
    """This moment as the log writes it: ``2026-01-31T12:00:00.000000Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def trace_id_of(traceparent: str | None) -> str | None:
    """The trace id of a W3C `traceparent` header; None where there is none, or it is malformed."""
    found = _TRACEPARENT.fullmatch(traceparent.strip()) if traceparent else None
    return found[1] if found and found[1].strip("0") else None


def as_name(text: str) -> str:
    """A name as the log keeps it. A client may put any text in its place: of that it keeps the hash alone."""
    if _NAME.fullmatch(text):
        return text
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _name(value: object) -> object:
    return as_name(value) if isinstance(value, str) else value


def _line(value: object) -> object:
    return _UNPRINTABLE.sub("?", value)[:MAX_DETAIL] if isinstance(value, str) else value


def _is_a_moment(value: str) -> str:
    datetime.fromisoformat(value)
    return value


Name = Annotated[str, BeforeValidator(_name), Field(max_length=128)]
Digest = Annotated[str, Field(pattern=r"\A[0-9a-f]{8,128}\z")]
TraceId = Annotated[str, Field(pattern=r"\A[0-9a-f]{32}\z")]
Detail = Annotated[str, BeforeValidator(_line), Field(max_length=MAX_DETAIL)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Moment = Annotated[
    str,
    Field(pattern=r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\z"),
    AfterValidator(_is_a_moment),
]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class PolicyUse(_Strict):
    """A policy that a request met, or that a change was made to."""

    name: Name
    version: Count
    mode: Literal["enforce", "shadow", "off"]


class Watched(_Strict):
    """What a watch saw of a request: tokens looked at and fired on, its bound, the largest activation."""

    tokens: Count
    fired: Count
    above: float
    max: float | None = None


class Record(_Strict):
    """One entry. Names are identifiers of at most 128 characters, whatever else comes is kept as a hash.

    `detail` is for what the server itself has to say of a change; a request has none, so that no prompt, no
    completion and no message that quotes one can come in.
    """

    event: Literal["request", "policy", "keys", "start", "stop"]
    time: Moment = Field(default_factory=utc_now)
    request_id: Name | None = None
    trace_id: TraceId | None = None
    principal: Name | None = None
    route: Name | None = None
    model: Name | None = None
    outcome: Literal["ok", "refused", "aborted", "failed", "left"] | None = None
    status: int | None = Field(None, ge=100, le=599)
    reason: Name | None = None
    plan: Digest | None = None
    policies: tuple[PolicyUse, ...] = Field((), max_length=MAX_ENTRIES)
    saes: dict[Name, Digest] = Field(default_factory=dict, max_length=MAX_ENTRIES)
    tokens: Count = 0
    watched: dict[Name, Watched] = Field(default_factory=dict, max_length=MAX_ENTRIES)
    detail: Detail = ""

    @model_validator(mode="after")
    def _a_request_has_no_words(self) -> Record:
        if self.event == "request" and self.detail:
            raise ValueError("expected no `detail` of a request: say it in `reason`, one word")
        return self
