"""Walking a chain: does each line follow the one before, and if not, what was done to which line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from .chain import GENESIS, Head
from .heads import HeadFile, HeadLine
from .lines import Fault, Item, Line, Torn
from .signing import VerifyingKey

__all__ = ["Walk"]


@dataclass
class Walk:
    """Follows a chain from `head`, which has been checked, to its end or to the first fault.

    Args:
        folder: where its files are.
        key: whose signatures are expected.
        signed: what the file beside the chain says of its end.
        anchor: a head known from outside.
    """

    folder: Path
    key: VerifyingKey
    head: Head = GENESIS
    signed: HeadFile | None = None
    anchor: Head | None = None

    def __post_init__(self) -> None:
        self.last: Line | None = None
        self.at_anchor: Line | None = None
        self.torn: Torn | None = None
        self.lines = 0
        self._earlier = self.head

    def run(self, items: Iterable[Item]) -> Fault | None:
        """Read everything. Returns: the first fault."""
        rest = iter(items)
        item = next(rest, None)
        while item is not None:
            following = next(rest, None)
            if isinstance(item, Torn):
                self.torn = item
            else:
                fault = item if isinstance(item, Fault) else self._accept(item, following, rest)
                if fault is not None:
                    return fault
            item = following
        return self._cut_off()

    def _accept(self, line: Line, following: Item | None, rest: Iterator[Item]) -> Fault | None:
        if not line.follows(self.head):
            return self._misplaced(line, following, rest)
        if isinstance(line.entry, HeadLine) and (why := line.entry.fault(self.key)):
            return Fault("bad signature", why, line.file, line.number)
        if self.signed is not None and self.signed.seq == line.head.seq:
            fault = self._against_signed(line, self.signed)
            if fault is not None:
                return fault
        if self.anchor is not None and self.anchor.seq == line.head.seq:
            self.at_anchor = line
        self._earlier, self.head, self.last = self.head, line.head, line
        self.lines += 1
        return None

    def _against_signed(self, line: Line, signed: HeadFile) -> Fault | None:
        if line.head != signed.head:
            why = "expected the line that the signed head names, got another"
            return Fault("edited", why, line.file, line.number)
        if line.file.name != signed.file:
            why = f"expected line {signed.seq} in {signed.file}, where the signed head has it"
            return Fault("reordered", why, line.file, line.number)
        return None

    def _misplaced(self, line: Line, following: Item | None, rest: Iterator[Item]) -> Fault:
        expected, seq = self.head.seq + 1, line.entry.seq
        if line.entry.prev == self.head.hash:
            why = f"expected `seq` {expected}, got {seq}"
            return Fault("edited", why, line.file, line.number)
        if seq == expected:
            return self._edited(line, following)
        if seq < expected:
            return self._inserted(line, following)
        return self._gap(line, following, rest)

    def _edited(self, line: Line, following: Item | None) -> Fault:
        """Of two lines that do not fit, the one to which no other holds was changed."""
        if self.last is not None and self._is_held(line, following):
            why = "expected the line whose hash the next one names, got another"
            return Fault("edited", why, self.last.file, self.last.number)
        why = "expected `prev` to be the hash of the line before"
        return Fault("edited", why, line.file, line.number)

    def _is_held(self, line: Line, following: Item | None) -> bool:
        if isinstance(following, Line):
            return following.follows(line.head)
        return self.signed is not None and self.signed.head == line.head

    def _inserted(self, line: Line, following: Item | None) -> Fault:
        last = self.last
        if last is not None and last.raw != line.raw and line.follows(self._earlier):
            why = f"expected one line of `seq` {line.entry.seq}, got two"
            place = last if self._is_held(line, following) else line
            return Fault("inserted", why, place.file, place.number)
        why = f"expected `seq` {self.head.seq + 1}, got {line.entry.seq} again"
        return Fault("inserted", why, line.file, line.number)

    def _gap(self, line: Line, following: Item | None, rest: Iterator[Item]) -> Fault:
        expected, seq = self.head.seq + 1, line.entry.seq
        later = chain([following] if following is not None else [], rest)
        if any(isinstance(item, Line) and item.entry.seq == expected for item in later):
            why = f"expected `seq` {expected}, got {seq}; {expected} comes later"
            return Fault("reordered", why, line.file, line.number)
        missing = f"`seq` {expected}" if seq == expected + 1 else f"`seq` {expected} to {seq - 1}"
        if self.last is not None and self.last.file != line.file:
            why = f"expected {missing} here, before {line.file.name} goes on with {seq}"
            return Fault("truncated", why, self.last.file, self.last.number + 1)
        return Fault("deleted", f"expected {missing}, got {seq}", line.file, line.number)

    def _cut_off(self) -> Fault | None:
        signed = self.signed
        if signed is None or signed.seq <= self.head.seq:
            return None
        why = f"expected `seq` {signed.seq}, which the signed head names, the chain ends at {self.head.seq}"
        if self.torn is not None:
            return Fault("truncated", why, self.torn.file, self.torn.number)
        if self.last is not None:
            return Fault("truncated", why, self.last.file, self.last.number + 1)
        return Fault("truncated", why, self.folder / signed.file, 1)
