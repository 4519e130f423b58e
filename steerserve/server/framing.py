"""Where one server-sent event ends and the next begins, wherever the chunks that carry them do."""

from __future__ import annotations

import re

__all__ = ["EventFramer"]

_LINE_END = re.compile(rb"\r\n|\r|\n")


class EventFramer:
    """Cuts a stream of bytes behind blank lines. No byte is changed, and no whole event is held back.

    A line ends with LF, CR or CRLF, as its sender likes (HTML standard, "Server-sent events", parsing an
    event stream). A CR that ends a chunk ends its line at once; an LF that follows belongs to it.
    """

    def __init__(self) -> None:
        self._held = b""
        self._scanned = 0
        self._last = b""
        self._line = 0  # where the line begins that has not ended yet

    def feed(self, chunk: bytes) -> bytes:
        """The next bytes of the stream. Returns: all that is known now up to the end of a whole event."""
        if not chunk:
            return b""
        whole, after_cr = self._begin(chunk)
        self._held += chunk
        for end in _LINE_END.finditer(self._held, self._scanned + after_cr):
            if end.start() == self._line:
                whole = end.end()
            self._line = end.end()
        events, self._held = self._held[:whole], self._held[whole:]
        self._scanned, self._line = len(self._held), self._line - whole
        self._last = chunk[-1:]
        return events

    def rest(self) -> bytes:
        """What is held, of an event that has not ended; the stream has."""
        held, self._held = self._held, b""
        self._scanned = self._line = 0
        return held

    def _begin(self, chunk: bytes) -> tuple[int, int]:
        """How much is whole and how much is scanned of a chunk that may begin with the LF of a CRLF."""
        if self._last != b"\r" or not chunk.startswith(b"\n"):
            return 0, 0
        self._line += 1
        return (1 if self._scanned == 0 else 0), 1
