"""`steerserve keys`: make, list, revoke and check the keys of a file that servers follow as it changes."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from steerserve.errors import ConfigError, KeyFileError

from .key_entry import KeyEntry, new_entry
from .key_file import Keys, change_key_file, read_key_file
from .key_text import new_key_text, split_key_text
from .limits import Limits
from .principal import SCOPES, ScopeName

__all__ = ["app"]

app = typer.Typer(
    help="Make, list, revoke and check API keys. A running server follows the file within a second.",
    no_args_is_help=True,
)

FileArgument = Annotated[Path, typer.Argument(help="The file of keys (YAML). It holds hashes, never a key.")]
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@app.command()
def create(
    file: FileArgument,
    name: Annotated[str, typer.Option(help="Who holds the key: shown in errors, logs and the audit.")],
    scope: Annotated[
        list[str],
        typer.Option(
            help="What it may do: infer (generate, embed, list models), steer (send `steering`), inspect "
            "(see what is served), admin (everything else). None implies another. May be given several times."
        ),
    ],
    expires: Annotated[
        str | None, typer.Option(help="30d, 12h, 90m or 4w from now, or a date-time with its time zone.")
    ] = None,
    limit_sae: Annotated[
        list[str] | None,
        typer.Option(
            help="An SAE, or direction:NAME, that it may steer; no other. May be given several times."
        ),
    ] = None,
    limit_op: Annotated[
        list[str] | None,
        typer.Option(
            help='An op that it may use, or abort for `then: "abort"`; no other. May be given several times.'
        ),
    ] = None,
    limit_features: Annotated[
        list[str] | None,
        typer.Option(
            help="SAE:START-STOP, features from START up to but without STOP, or SAE:FEATURE; no other of "
            "that SAE. May be given several times."
        ),
    ] = None,
    limit_max_value: Annotated[
        float | None, typer.Option(help="The largest |value|, in raw units, and the largest factor of scale.")
    ] = None,
    limit_max_interventions: Annotated[
        int | None, typer.Option(help="The most interventions in one request.")
    ] = None,
    limit_requests_per_minute: Annotated[
        int | None, typer.Option(help="The most requests to the model in any 60 seconds, per server process.")
    ] = None,
) -> None:
    """Add a key to FILE, which is made if it is not there, and print the key. It is shown this once."""
    limits = _limits(
        saes=limit_sae,
        ops=limit_op,
        features=_features(limit_features) if limit_features else None,
        max_value=limit_max_value,
        max_interventions=limit_max_interventions,
        requests_per_minute=limit_requests_per_minute,
    )
    key = new_key_text()
    entry = new_entry(key, name, _scopes(scope), limits, _expiry(expires) if expires else None)
    change_key_file(file, lambda found: _with(found, entry, file), create=True)
    Console(stderr=True, soft_wrap=True).print(
        f"{file}: added key `{name}` ({entry.id}). This is the only time that it is shown:",
        highlight=False,
        markup=False,
    )
    print(key)


@app.command("list")
def list_keys(file: FileArgument) -> None:
    """Show who holds keys in FILE and what each may do; never the hashes."""
    table = Table("id", "name", "scopes", "limits", "created", "expires")
    for key in read_key_file(file)[0].keys:
        table.add_row(
            key.id, key.name, " ".join(key.scopes), _say(key.limits), f"{key.created:%Y-%m-%d}", _until(key)
        )
    Console().print(table)


@app.command()
def revoke(
    file: FileArgument, key: Annotated[str, typer.Argument(help="The id or the name of the key.")]
) -> None:
    """Take a key out of FILE. A running server refuses it within a second."""
    change_key_file(file, lambda found: _without(found, key, file))
    Console(stderr=True, soft_wrap=True).print(f"{file}: revoked `{key}`", highlight=False, markup=False)


@app.command()
def check(file: FileArgument) -> None:
    """Read a key from stdin and say who holds it and what it may do. Exit code 2 if it opens nothing."""
    key = split_key_text(sys.stdin.readline().strip())
    if key is None:
        raise KeyFileError("expected a key, sk-steer-ID-SECRET, as the first line of stdin")
    entry = next((entry for entry in read_key_file(file)[0].keys if entry.id == key.id), None)
    if entry is None or not entry.opens_with(key.secret):
        raise KeyFileError(f"expected a key of this file, got one that it does not hold - in {file}")
    if entry.has_expired:
        raise KeyFileError(f"expected a key in force, got `{entry.name}`, {_until(entry)} - in {file}")
    print(
        f"{entry.name} ({entry.id}): {' '.join(entry.scopes)}; limits: {_say(entry.limits)}; {_until(entry)}"
    )


def _with(keys: Keys, entry: KeyEntry, file: Path) -> Keys:
    if any(key.name == entry.name for key in keys):
        raise KeyFileError(f"expected a new name, got `{entry.name}`: revoke that key first - in {file}")
    return (*keys, entry)


def _without(keys: Keys, wanted: str, file: Path) -> Keys:
    matching = [key for key in keys if wanted in (key.id, key.name)]
    if len(matching) != 1:
        names = ", ".join(f"{key.name} ({key.id})" for key in keys) or "none"
        raise KeyFileError(f"expected the id or name of one key ({names}), got {wanted!r} - in {file}")
    return tuple(key for key in keys if key is not matching[0])


def _limits(**limits: Any) -> Limits:
    try:
        return Limits(**{name: value for name, value in limits.items() if value is not None})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        said = str(problem["msg"]).removeprefix("Value error, ")
        option = f" - at --limit-{str(problem['loc'][0]).replace('_', '-')}" if problem["loc"] else ""
        raise ConfigError(
            said + option.replace("limit-saes", "limit-sae").replace("limit-ops", "limit-op")
        ) from None


def _scopes(given: list[str]) -> tuple[ScopeName, ...]:
    for scope in given:
        if scope not in SCOPES:
            raise ConfigError(f"expected --scope to be one of {', '.join(SCOPES)}, got {scope!r}")
    return tuple(scope for scope in SCOPES if scope in given)


def _features(given: list[str]) -> dict[str, list[list[int]]]:
    """SAE:START-STOP and SAE:FEATURE, by SAE."""
    ranges: dict[str, list[list[int]]] = {}
    for text in given:
        found = re.fullmatch(r"([^:]+):([0-9]{1,10})(?:-([0-9]{1,10}))?", text)
        if found is None:
            raise ConfigError(f"expected --limit-features SAE:START-STOP, got {text!r}")
        start = int(found[2])
        ranges.setdefault(found[1], []).append([start, int(found[3]) if found[3] else start + 1])
    return ranges


def _expiry(text: str) -> datetime:
    wanted = "expected --expires to be like 30d, or a date-time with its time zone (2030-01-31T00:00:00Z)"
    span = re.fullmatch(r"([0-9]{1,9})([mhdw])", text)
    now = datetime.now(UTC).replace(microsecond=0)
    try:
        moment = now + timedelta(**{_UNITS[span[2]]: int(span[1])}) if span else datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ConfigError(f"{wanted}, got {text!r}") from None
    if moment.tzinfo is None:
        raise ConfigError(f"{wanted}, got {text!r} without one")
    if moment <= now:
        raise ConfigError(f"expected --expires to lie ahead, got {moment.isoformat()}")
    return moment


def _say(limits: Limits) -> str:
    held = limits.model_dump(mode="json", exclude_none=True)
    return " ".join(f"{name}={value}" for name, value in held.items()) or "none"


def _until(key: KeyEntry) -> str:
    if key.expires is None:
        return "never expires"
    return f"{'expired' if key.has_expired else 'expires'} {key.expires:%Y-%m-%d %H:%M %Z}"
