"""Whether an audit log is what was written: every line of it, in order, none more and none less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from steerserve.errors import AuditError

from .chain import Head
from .checking import Walk
from .files import PUBLIC_KEY, ChainFiles, chains_in
from .heads import HeadFile, read_head_file
from .lines import Fault, Item, read_files
from .signing import VerifyingKey, read_public_key

__all__ = ["ChainVerdict", "Verdict", "sound_head_file", "verify"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ChainVerdict:
    """What was found of one chain, up to its end or its first fault.

    `unsigned` lines stand behind the signed head, and `torn` bytes of a half line may follow: both are what
    a crash leaves, and what a server that is writing has not signed yet.
    """

    prefix: str
    files: int
    lines: int
    head: Head
    unsigned: int
    torn: int
    fault: Fault | None


@dataclass(frozen=True)
class Verdict:
    """What was found of a folder. `key_id` names the key whose signatures were expected."""

    chains: tuple[ChainVerdict, ...]
    fault: Fault | None
    key_id: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.fault is None


def verify(
    folder: Path,
    public_key: Path | None = None,
    head: Head | None = None,
    progress: Progress = lambda done, total: None,
) -> Verdict:
    """Read every chain of the folder.

    Args:
        public_key: PEM of the key to expect. Without it the one in the folder is, which vouches for nothing
            against those who can write there.
        head: a place in one of the chains, known from outside.
        progress: told the bytes read, and the bytes to read.
    Raises: AuditError if the folder or the given key cannot be read.
    """
    try:
        key = _key(folder, public_key)
        if isinstance(key, Fault):
            return Verdict((), key)
        return _verify(folder, key, head, progress)
    except OSError as error:
        raise AuditError(f"expected to read the audit log in {folder}: {error}") from error


def sound_head_file(files: ChainFiles, key: VerifyingKey) -> HeadFile | Fault:
    """The signed head beside a chain, or what is wrong with it."""
    found = read_head_file(files.head)
    if found is None:
        return Fault("file missing", "expected the signed head of the chain", files.head)
    if isinstance(found, str):
        return Fault("edited", found, files.head, 1)
    why = found.fault(key)
    return found if why is None else Fault("bad signature", why, files.head, 1)


def _key(folder: Path, public_key: Path | None) -> VerifyingKey | Fault:
    if public_key is not None:
        return read_public_key(public_key)
    beside = folder / PUBLIC_KEY
    if folder.is_dir() and not beside.exists():
        return Fault("file missing", "expected the public key of the log", beside)
    try:
        return read_public_key(beside)
    except AuditError as error:
        if not folder.is_dir():
            raise
        return Fault("edited", str(error), beside)


def _verify(folder: Path, key: VerifyingKey, anchor: Head | None, progress: Progress) -> Verdict:
    chains = [ChainFiles(folder, prefix) for prefix in chains_in(folder)]
    if not chains:
        return Verdict((), Fault("file missing", "expected an audit log, there is none", folder), key.id)
    advance = _adding_up(sum(path.stat().st_size for files in chains for path in files.found()), progress)
    walks = [(files, Walk(folder, key, anchor=anchor)) for files in chains]
    verdicts = tuple(_verify_chain(files, walk, advance) for files, walk in walks)
    faults = [verdict.fault for verdict in verdicts if verdict.fault is not None]
    if not faults and anchor is not None:
        faults = _against_anchor([walk for _, walk in walks], anchor)
    return Verdict(verdicts, faults[0] if faults else None, key.id)


def _verify_chain(files: ChainFiles, walk: Walk, advance: Callable[[int], None]) -> ChainVerdict:
    signed = sound_head_file(files, walk.key)
    walk.signed = signed if isinstance(signed, HeadFile) else None
    # Listed after the head was read: a server that writes meanwhile only makes the log longer than that.
    paths = files.found()
    fault = walk.run(_items(files, paths, walk.signed, advance))
    if fault is None and isinstance(signed, Fault):
        fault = signed
    unsigned = walk.head.seq - walk.signed.seq if walk.signed and not fault else 0
    torn = walk.torn.size if walk.torn else 0
    return ChainVerdict(files.prefix, len(paths), walk.lines, walk.head, unsigned, torn, fault)


def _items(
    files: ChainFiles, paths: list[Path], signed: HeadFile | None, advance: Callable[[int], None]
) -> Iterator[Item]:
    wanted = [files.numbered(number) for number in range(1, len(paths) + 1)]
    at = next((i for i, path in enumerate(paths) if path != wanted[i]), len(paths))
    yield from read_files(paths[:at], advance)
    if at < len(paths):
        yield Fault("file missing", f"expected it before {paths[at].name}", wanted[at])
    elif signed is not None and signed.seq and files.folder / signed.file not in paths:
        why = f"expected it to hold `seq` {signed.seq}, as the signed head says"
        yield Fault("file missing", why, files.folder / signed.file)


def _against_anchor(walks: list[Walk], anchor: Head) -> list[Fault]:
    """No fault if one of the chains passes through the anchor."""
    lines = [walk.at_anchor for walk in walks if walk.at_anchor is not None]
    if any(line.head == anchor for line in lines):
        return []
    if lines:
        why = f"expected the hash {anchor.hash}, got {lines[0].head.hash}: the log was written anew"
        return [Fault("edited", why, lines[0].file, lines[0].number)]
    longest = max(walks, key=lambda walk: walk.head.seq)
    why = f"expected a chain to reach `seq` {anchor.seq}, the longest ends at {longest.head.seq}"
    last = longest.last
    return [Fault("truncated", why, last.file if last else longest.folder, last.number + 1 if last else None)]


def _adding_up(total: int, progress: Progress) -> Callable[[int], None]:
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    return advance
