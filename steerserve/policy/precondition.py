"""What a change says of the document that it changes, held to the one in place; RFC 9110, section 13."""

from __future__ import annotations

from steerserve.errors import StaleError

__all__ = ["check_precondition"]


def check_precondition(sha256: str | None, if_match: str | None, if_none_match: str | None = None) -> None:
    """Let nobody change what they have not read.

    Args:
        sha256: of the document in place; None where there is none.
        if_match: ETags, or `*`. What is in place is not changed without it, which the RFC would allow.
        if_none_match: ETags, or `*`.
    Raises: StaleError saying which header is wanted.
    """
    tag = None if sha256 is None else f'"{sha256}"'
    if if_match is not None and not _names(if_match, tag):
        message = f"expected `If-Match` to name what is in place, {tag or 'which is nothing'}; read it again"
    elif if_none_match is not None and _names(if_none_match, tag):
        message = f"expected to find no such policy (`If-None-Match`), there is {tag}"
    elif tag is not None and if_match is None:
        message = f"expected `If-Match` with the ETag of the policy that is changed, {tag}, or with `*`"
    else:
        return
    raise StaleError(message, at=("headers",), reason="stale")


def _names(header: str, tag: str | None) -> bool:
    tags = [part.strip() for part in header.split(",")]
    return tag is not None and (tag in tags or "*" in tags)
