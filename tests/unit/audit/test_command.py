from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from steerserve.audit import AuditLog, PolicyUse, Record, verify
from steerserve.audit.command import app
from steerserve.audit.signing import public_path
from steerserve.errors import AuditError, ConfigError

USE = PolicyUse(name="no-french", version=3, mode="enforce")
RECORDS = [
    Record(event="policy", principal="ann", policies=(USE,), detail="replaced version 2"),
    Record(
        event="request", principal="ann", route="/v1/completions", outcome="ok", policies=(USE,), tokens=5
    ),
    Record(
        event="request", principal="bob", route="/v1/messages", outcome="refused", status=403, reason="key"
    ),
]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    log = AuditLog(tmp_path / "log", fsync="never")
    for record in RECORDS:
        log.append(record).result()
    log.close()
    return tmp_path / "log"


def shown(folder: Path, *options: str) -> list[str]:
    """What `show --json` prints, each record as event:principal."""
    documents = [json.loads(line) for line in run("show", folder, "--json", *options).stdout.splitlines()]
    return [f"{document['event']}:{document['principal']}" for document in documents]


def test_verify_says_that_a_log_is_sound(folder: Path) -> None:
    result = run("verify", folder)
    assert result.exit_code == 0
    assert "audit: 6 lines in 1 files, head 6:" in result.stdout
    assert "if the key" in result.stdout


def test_verify_names_the_first_bad_line_with_exit_code_1(folder: Path) -> None:
    path = folder / "audit-000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"bob"', b'"bib"'))
    result = run("verify", folder)
    assert result.exit_code == 1
    assert f"{path}:4: edited" in result.stdout


def test_verify_takes_a_key_and_a_head_from_elsewhere(tmp_path: Path) -> None:
    assert run("keygen", tmp_path / "kept.pem").exit_code == 0
    log = AuditLog(tmp_path / "log", key=tmp_path / "kept.pem")
    log.close()
    key = public_path(tmp_path / "kept.pem")
    result = run("verify", tmp_path / "log", "--public-key", key, "--head", log.head)
    assert result.exit_code == 0
    assert f"sound, signed by {verify(tmp_path / 'log').key_id}" in result.stdout
    assert run("verify", tmp_path / "log", "--head", f"2:{'0' * 64}").exit_code == 1
    with pytest.raises(ConfigError, match="expected a head SEQ:HASH"):
        run("verify", tmp_path / "log", "--head", "2")


def test_verify_tells_of_what_a_crash_left(folder: Path) -> None:
    with (folder / "audit-000001.jsonl").open("ab") as stream:
        stream.write(b"half")
    result = run("verify", folder)
    assert result.exit_code == 0
    assert "4 bytes of a half-written last line" in result.stdout


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], ["start:None", "policy:ann", "request:ann", "request:bob", "stop:None"]),
        (["--principal", "ann"], ["policy:ann", "request:ann"]),
        (["--route", "/v1/messages"], ["request:bob"]),
        (["--policy", "no-french"], ["policy:ann", "request:ann"]),
        (["--outcome", "refused"], ["request:bob"]),
        (["--principal", "ann", "--outcome", "ok"], ["request:ann"]),
        (["--principal", "no name of a key"], []),
        (["--tail", "2"], ["request:bob", "stop:None"]),
        (["--since", "2020"], ["start:None", "policy:ann", "request:ann", "request:bob", "stop:None"]),
        (["--since", "2999-01-01T00:00"], []),
    ],
)
def test_show_finds_records(folder: Path, options: list[str], found: list[str]) -> None:
    assert shown(folder, *options) == found


def test_show_prints_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    printed = run("show", folder).stdout
    assert "no-french@3:enforce" in printed
    assert "replaced version 2" in printed
    assert "403" in printed


def test_show_puts_the_chains_together_by_time(folder: Path) -> None:
    AuditLog(folder, "api-1", fsync="never").close()
    lines = [json.loads(line) for line in run("show", folder, "--json").stdout.splitlines()]
    assert [line["event"] for line in lines] == [
        *("start", "policy", "request", "request", "stop"),
        *("start", "stop"),
    ]
    AuditLog(folder, fsync="never").close()
    lines = [json.loads(line) for line in run("show", folder, "--json", "--tail", "2").stdout.splitlines()]
    assert [(line["event"], line["seq"]) for line in lines] == [("start", 7), ("stop", 8)]


def test_show_tells_of_a_folder_without_a_log_and_a_time_that_is_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AuditError, match="there is none"):
        run("show", tmp_path / "empty")
    with pytest.raises(AuditError, match="nowhere"):
        run("show", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="expected a UTC time"):
        run("show", folder, "--since", "yesterday")


def test_keygen_never_overwrites(tmp_path: Path) -> None:
    assert "public key" in run("keygen", tmp_path / "a.pem").stdout
    assert (tmp_path / "a.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(AuditError, match="never overwritten"):
        run("keygen", tmp_path / "a.pem")
