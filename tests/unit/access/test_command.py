import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from steerserve.access.command import app
from steerserve.access.key_file import read_key_file
from steerserve.access.key_text import KeyText, split_key_text
from steerserve.access.limits import Limits
from steerserve.errors import ConfigError, KeyFileError, SteerserveError

from .conftest import WriteKeys, make_entry


def run(*arguments: object, stdin: str | None = None) -> Any:
    result = CliRunner(env={"COLUMNS": "400"}).invoke(
        app, [str(argument) for argument in arguments], input=stdin
    )
    if isinstance(result.exception, SteerserveError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def create(file: Path, *options: object) -> Any:
    return run("create", file, "--name", "team", "--scope", "infer", *options)


def test_the_key_is_printed_once_and_alone_on_stdout(file: Path) -> None:
    result = create(file)
    key = split_key_text(result.stdout.strip())
    assert key is not None
    assert key.secret not in result.stderr
    assert "team" in result.stderr
    (entry,) = read_key_file(file)[0].keys
    assert entry.opens_with(key.secret)
    assert key.secret not in file.read_text()


def test_every_limit_reaches_the_file(file: Path) -> None:
    create(
        file,
        *("--scope", "steer", "--expires", "30d"),
        *("--limit-sae", "demo", "--limit-sae", "direction:french"),
        *("--limit-op", "ablate", "--limit-op", "clamp"),
        *("--limit-features", "demo:0-100", "--limit-features", "demo:512"),
        *("--limit-max-value", "8", "--limit-max-interventions", "4"),
        *("--limit-requests-per-minute", "60"),
    )
    (entry,) = read_key_file(file)[0].keys
    assert entry.scopes == ("infer", "steer")
    assert entry.limits == Limits(
        saes=("demo", "direction:french"),
        ops=("ablate", "clamp"),
        features={"demo": ((0, 100), (512, 513))},
        max_value=8.0,
        max_interventions=4,
        requests_per_minute=60,
    )
    assert entry.expires is not None
    assert entry.expires - entry.created >= timedelta(days=30) - timedelta(seconds=5)


def test_a_key_without_limits_has_none(file: Path) -> None:
    create(file)
    (entry,) = read_key_file(file)[0].keys
    assert entry.limits == Limits()
    assert entry.expires is None


@pytest.mark.parametrize(
    ("text", "days"), [("2w", 14), ("30d", 30), ("48h", 2), ("1440m", 1), ("2999-01-01T00:00:00+02:00", 1000)]
)
def test_an_expiry_is_a_span_or_a_moment(file: Path, text: str, days: int) -> None:
    create(file, "--expires", text)
    (entry,) = read_key_file(file)[0].keys
    assert entry.expires is not None
    assert entry.expires > datetime.now(UTC) + timedelta(days=days, seconds=-60)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scope", "root"], "--scope to be one of infer, steer, inspect, admin, got 'root'"),
        (["--expires", "soon"], "--expires to be like 30d"),
        (["--expires", "2030-01-01"], "without one"),
        (["--expires", "999999999w"], "--expires to be like 30d"),
        (["--expires", "0d"], "to lie ahead"),
        (["--expires", "2020-01-01T00:00:00Z"], "to lie ahead"),
        (["--limit-op", "melt"], "--limit-op"),
        (["--limit-sae", "a b"], "--limit-sae"),
        (["--limit-features", "demo"], "--limit-features SAE:START-STOP, got 'demo'"),
        (["--limit-features", "demo:5-5"], r"\[5, 5\]"),
        (["--limit-features", "a b:5"], "--limit-features"),
        (["--limit-max-value", "nan"], "--limit-max-value"),
        (["--limit-max-interventions", "-1"], "--limit-max-interventions"),
        (["--limit-requests-per-minute", "0"], "--limit-requests-per-minute"),
    ],
)
def test_an_option_that_is_wrong_is_named_and_writes_nothing(
    file: Path, options: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        create(file, *options)
    assert not file.exists()


def test_a_name_is_given_once(file: Path) -> None:
    create(file)
    with pytest.raises(KeyFileError, match="expected a new name, got `team`: revoke that key first"):
        create(file)
    assert len(read_key_file(file)[0].keys) == 1


def test_a_file_that_is_bad_is_not_written_over(file: Path) -> None:
    file.write_text("version: 1\nkeys: [1]\n")
    with pytest.raises(KeyFileError):
        create(file)
    assert file.read_text() == "version: 1\nkeys: [1]\n"


def test_the_list_shows_who_may_what_and_never_a_hash(write_keys: WriteKeys, key: KeyText) -> None:
    entry = make_entry(key, scopes=["infer", "steer"], limits={"max_value": 8.0}, expires="2020-01-01T00:00Z")
    said = run("list", write_keys(entry)).stdout
    for shown in (key.id, "team", "infer steer", "max_value=8.0", "2026-01-01", "expired 2020-01-01"):
        assert shown in said
    assert entry.hash not in said
    assert entry.salt not in said


@pytest.mark.parametrize("by", ["id", "name"])
def test_a_key_is_revoked_by_id_or_name(write_keys: WriteKeys, key: KeyText, by: str) -> None:
    other = make_entry(KeyText("f" * 12, "s" * 43), "other")
    path = write_keys(make_entry(key), other)
    run("revoke", path, key.id if by == "id" else "team")
    assert read_key_file(path)[0].keys == (other,)


def test_what_names_no_key_or_two_is_not_revoked(write_keys: WriteKeys, key: KeyText) -> None:
    path = write_keys(make_entry(key), make_entry(KeyText("f" * 12, "s" * 43), key.id))
    for wanted in ("nobody", key.id):
        with pytest.raises(
            KeyFileError, match=re.escape(f"one key (team ({key.id}), {key.id} (ffffffffffff))")
        ):
            run("revoke", path, wanted)
    assert len(read_key_file(path)[0].keys) == 2


def test_a_key_that_was_created_checks_and_one_that_was_revoked_does_not(file: Path) -> None:
    key = create(file, "--limit-max-value", "8").stdout
    said = run("check", file, stdin=key).stdout
    assert said.startswith("team (")
    assert "infer; limits: max_value=8.0; never expires" in said
    run("revoke", file, "team")
    with pytest.raises(KeyFileError, match="got one that it does not hold"):
        run("check", file, stdin=key)


@pytest.mark.parametrize("stdin", ["", "\n", "no key\n", "\0"])
def test_what_is_no_key_is_not_checked(write_keys: WriteKeys, stdin: str) -> None:
    with pytest.raises(KeyFileError, match="as the first line of stdin"):
        run("check", write_keys(), stdin=stdin)


def test_a_wrong_secret_and_an_expired_key_do_not_check(write_keys: WriteKeys, key: KeyText) -> None:
    path = write_keys(make_entry(key, expires="2020-01-01T00:00:00Z"))
    with pytest.raises(KeyFileError, match="got `team`, expired 2020-01-01 00:00 UTC"):
        run("check", path, stdin=str(key))
    with pytest.raises(KeyFileError, match="does not hold"):
        run("check", path, stdin=str(KeyText(key.id, "s" * 43)))


def test_help_says_what_each_command_and_option_is_for() -> None:
    said = run("create", "--help").stdout
    assert "It is shown this once" in said
    assert "None implies another" in said
    for command in ("create", "list", "revoke", "check"):
        assert command in run("--help").stdout
