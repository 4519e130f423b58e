"""`steerserve audit`: check an audit log, read it, and make the key that signs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .chain import Head
from .lines import Line, LinkedRecord
from .search import Search, search
from .signing import make_key, public_path
from .verify import Verdict
from .verify import verify as verify_log

__all__ = ["app"]

app = typer.Typer(help="Check and read audit logs, and make keys that sign them.", no_args_is_help=True)

FolderArgument = Annotated[Path, typer.Argument(help="The folder of the audit log.")]


@app.command()
def verify(
    folder: FolderArgument,
    public_key: Annotated[
        Path | None,
        typer.Option(
            help="PEM of the key that signed the log. Without it the one in FOLDER is taken, which whoever "
            "can write there can replace."
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(metavar="SEQ:HASH", help="A head that was kept elsewhere, which the log must pass."),
    ] = None,
) -> None:
    """Read all of FOLDER, and name the first line that is not what was written; exit code 1 then."""
    anchor = None if head is None else Head.parse(head)
    with _bar("verify") as advance:
        verdict = verify_log(folder, public_key, anchor, advance)
    for line in _told(verdict, given=public_key is not None):
        print(line)
    if not verdict.ok:
        raise typer.Exit(1)


@app.command()
def show(
    folder: FolderArgument,
    principal: Annotated[str | None, typer.Option(help="Only of this key's name.")] = None,
    route: Annotated[str | None, typer.Option(help="Only on this route.")] = None,
    policy: Annotated[str | None, typer.Option(help="Only where this policy had a part.")] = None,
    outcome: Annotated[
        str | None, typer.Option(help="Only with this outcome: ok, refused, aborted, failed or left.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Only from this UTC time on: 2026-01-31, or 2026-01-31T12:00.")
    ] = None,
    tail: Annotated[int | None, typer.Option(min=1, help="Only the last so many of these.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the lines as they are.")] = False,
) -> None:
    """Print the records of FOLDER as they were written. Nothing is checked: `verify` does that."""
    found: Iterable[Line] = search(folder, Search(principal, route, policy, outcome, since))
    if tail is not None:
        found = deque(found, maxlen=tail)
    if as_json:
        for line in found:
            print(line.raw.decode("ascii"))
    else:
        Console().print(_table(found))


@app.command()
def keygen(
    path: Annotated[Path, typer.Argument(help="Where the private key goes, readable by its owner alone.")],
) -> None:
    """Make an Ed25519 key at PATH, and beside it the public half, NAME.pub.pem, for `verify --public-key`."""
    key = make_key(path)
    print(f"{path}: made; keep it from those who can write the log")
    print(f"{public_path(path)}: the public key {key.public.id}; keep a copy elsewhere")


def _told(verdict: Verdict, *, given: bool) -> Iterator[str]:
    for chain in verdict.chains:
        yield f"{chain.prefix}: {chain.lines:,} lines in {chain.files} files, head {chain.head}"
        if chain.unsigned:
            yield f"{chain.prefix}: {chain.unsigned} lines behind the signed head, which a crash may leave"
        if chain.torn:
            yield f"{chain.prefix}: {chain.torn} bytes of a half-written last line, which a crash may leave"
    if verdict.fault is not None:
        yield str(verdict.fault)
    elif given:
        yield f"sound, signed by {verdict.key_id}"
    else:
        yield f"sound, if the key {verdict.key_id} beside the log is the one that signed it (--public-key)"


def _table(lines: Iterable[Line]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("time", "event", "principal", "route", "outcome", "status", "reason", "tokens", "policies"):
        table.add_column(name)
    for line in lines:
        record = line.entry
        assert isinstance(record, LinkedRecord)
        uses = " ".join(f"{use.name}@{use.version}:{use.mode}" for use in record.policies)
        cells = (record.time, record.event, record.principal, record.route, record.outcome, record.status)
        words = [*cells, record.reason or record.detail, record.tokens, uses]
        table.add_row(*(Text("" if word is None else str(word)) for word in words))
    return table


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr. Yields: what to tell the bytes done and the bytes to do."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
