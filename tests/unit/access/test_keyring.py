import asyncio
import logging
import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from steerserve.access import hashing, keyring
from steerserve.access.key_entry import KeyEntry
from steerserve.access.key_text import KeyText, new_key_text
from steerserve.access.keyring import KeyRing
from steerserve.access.principal import Principal
from steerserve.errors import KeyFileError, UnauthenticatedError, UnavailableError

from .conftest import CHEAP, WriteKeys, make_entry


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at the file on every use."""
    monkeypatch.setattr(keyring, "CHECK_EVERY", 0.0)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(salt in hex, thread) of every scrypt."""
    seen: list[tuple[str, int]] = []
    original = hashing.hash_secret

    def spy(secret: str, salt: bytes, cost: hashing.Cost) -> bytes:
        seen.append((salt.hex(), threading.get_ident()))
        return original(secret, salt, cost)

    monkeypatch.setattr(hashing, "hash_secret", spy)
    return seen


def ask(ring: KeyRing, text: object) -> Principal:
    return asyncio.run(ring.authenticate(None if text is None else str(text)))


def failures() -> float:
    return REGISTRY.get_sample_value("steerserve_key_file_failures_total") or 0.0


def test_the_holder_of_a_key_is_known_with_its_scopes_and_limits(write_keys: WriteKeys, key: KeyText) -> None:
    entry = make_entry(key, scopes=["infer", "steer"], limits={"max_interventions": 2})
    assert ask(KeyRing(write_keys(entry)), key) == entry.principal


def test_the_names_are_sorted(write_keys: WriteKeys) -> None:
    path = write_keys(make_entry(new_key_text(), "b"), make_entry(new_key_text(), "a"))
    assert KeyRing(path).names == ("a", "b")


@pytest.mark.parametrize("text", [None, "", "x", "sk-steer-", "sk-steer-0123456789ab-short", "é" * 66])
def test_what_is_no_key_is_refused_without_hashing(
    write_keys: WriteKeys, hashed: list[tuple[str, int]], text: str | None
) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        ask(KeyRing(write_keys()), text)
    assert caught.value.status == 401
    assert caught.value.reason == "no_key"
    assert not hashed


def test_a_wrong_secret_and_an_unknown_id_cost_and_say_the_same(
    write_keys: WriteKeys, key: KeyText, hashed: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs: list[hashing.Cost] = []
    compared: list[bytes] = []
    original = hashing.matches

    def spy(secret: str, salt: bytes, cost: hashing.Cost, expected: bytes) -> bool:
        costs.append(cost)
        compared.append(expected)
        return original(secret, salt, cost, expected)

    monkeypatch.setattr("steerserve.access.key_entry.matches", spy)
    ring = KeyRing(write_keys(make_entry(key)))
    hashed.clear()
    refusals = []
    for wrong in (KeyText(key.id, "s" * 43), KeyText("f" * 12, key.secret)):
        with pytest.raises(UnauthenticatedError) as caught:
            ask(ring, wrong)
        refusals.append((str(caught.value), caught.value.reason))
    assert refusals[0] == refusals[1]
    assert refusals[0][1] == "unknown_key"
    assert len(hashed) == 2
    assert costs == [CHEAP, CHEAP]
    assert {len(digest) for digest in compared} == {32}


def test_an_empty_file_hashes_too(write_keys: WriteKeys, key: KeyText, hashed: list[tuple[str, int]]) -> None:
    ring = KeyRing(write_keys())
    with pytest.raises(UnauthenticatedError):
        ask(ring, key)
    assert len(hashed) == 1


def test_scrypt_is_paid_once_per_key_and_never_on_the_event_loop(
    write_keys: WriteKeys, key: KeyText, hashed: list[tuple[str, int]]
) -> None:
    path = write_keys(make_entry(key))
    hashed.clear()
    ring = KeyRing(path)

    async def often() -> list[Principal]:
        return [
            *await asyncio.gather(*(ring.authenticate(str(key)) for _ in range(20))),
            await ring.authenticate(str(key)),
        ]

    assert {principal.name for principal in asyncio.run(often())} == {"team"}
    assert len(hashed) == 1
    assert hashed[0][1] != threading.get_ident()


def test_a_key_that_failed_is_hashed_again_and_never_remembered(
    write_keys: WriteKeys, key: KeyText, hashed: list[tuple[str, int]]
) -> None:
    ring = KeyRing(write_keys(make_entry(key)))
    hashed.clear()
    for _ in range(2):
        with pytest.raises(UnauthenticatedError):
            ask(ring, KeyText(key.id, "s" * 43))
    assert len(hashed) == 2


def test_no_more_than_two_hash_at_once_and_the_queue_is_bounded(
    write_keys: WriteKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "MAX_WAITING", 4)
    gate = threading.Event()
    lock, running, most = threading.Lock(), [0], [0]

    def slow(self: KeyEntry, secret: str) -> bool:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        gate.wait(30)
        with lock:
            running[0] -= 1
        return False

    monkeypatch.setattr(KeyEntry, "opens_with", slow)
    ring = KeyRing(write_keys())

    async def flood() -> list[str]:
        waiting = [asyncio.create_task(ring.authenticate(str(new_key_text()))) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError) as caught:
            await ring.authenticate(str(new_key_text()))
        assert caught.value.status == 503
        gate.set()
        return [type(error).__name__ for error in await asyncio.gather(*waiting, return_exceptions=True)]

    assert asyncio.run(flood()) == ["UnauthenticatedError"] * 4
    assert most[0] <= 2


def test_a_client_that_leaves_takes_the_answer_from_nobody(
    write_keys: WriteKeys, key: KeyText, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def slow(self: KeyEntry, secret: str) -> bool:
        return gate.wait(30)

    monkeypatch.setattr(KeyEntry, "opens_with", slow)
    ring = KeyRing(write_keys(make_entry(key)))

    async def go() -> Principal:
        first, second = (asyncio.create_task(ring.authenticate(str(key))) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert first.cancelled()
        gate.set()
        return await second

    assert asyncio.run(go()).name == "team"


def test_an_expired_key_is_refused_by_name_even_once_it_is_remembered(
    write_keys: WriteKeys, key: KeyText, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = make_entry(key, expires=datetime.now(UTC) + timedelta(days=1))
    ring = KeyRing(write_keys(entry))
    assert ask(ring, key).name == "team"
    monkeypatch.setattr(KeyEntry, "has_expired", True)
    with pytest.raises(UnauthenticatedError, match="got key `team`, which expired at 20") as caught:
        ask(ring, key)
    assert caught.value.reason == "expired"


def test_only_the_holder_is_told_that_a_key_expired(write_keys: WriteKeys, key: KeyText) -> None:
    ring = KeyRing(write_keys(make_entry(key, expires="2020-01-01T00:00:00Z")))
    with pytest.raises(UnauthenticatedError, match="expired at 2020"):
        ask(ring, key)
    with pytest.raises(UnauthenticatedError, match="an unknown key"):
        ask(ring, KeyText(key.id, "s" * 43))


@pytest.mark.usefixtures("impatient")
def test_a_changed_file_adds_revokes_and_changes_keys(write_keys: WriteKeys, key: KeyText) -> None:
    other = new_key_text()
    ring = KeyRing(write_keys(make_entry(key)))
    assert ask(ring, key).scopes == {"infer"}
    write_keys(make_entry(key, scopes=["admin"]), make_entry(other, "other"))
    assert ask(ring, key).scopes == {"admin"}
    assert ask(ring, other).name == "other"
    write_keys(make_entry(other, "other"))
    with pytest.raises(UnauthenticatedError):
        ask(ring, key)
    assert ring.names == ("other",)


@pytest.mark.usefixtures("impatient")
def test_what_is_taken_away_counts_at_once_and_what_is_granted_once_it_is_on_record(
    write_keys: WriteKeys, key: KeyText
) -> None:
    gone, changed, new = (new_key_text() for _ in range(3))
    ring = KeyRing(write_keys(make_entry(key), make_entry(gone, "gone"), make_entry(changed, "changed")))
    said: list[str] = []

    def full(detail: str) -> None:
        assert ring._keys.entries.keys() == {key.id}
        said.append(detail)
        raise UnavailableError("expected room in the audit log", at=(), reason="audit")

    ring.record = full
    write_keys(make_entry(key), make_entry(changed, "changed", scopes=["admin"]), make_entry(new, "new"))
    counted = failures()
    for other in (gone, changed, new):
        with pytest.raises(UnauthenticatedError):
            ask(ring, other)
    assert ask(ring, key).name == "team"
    assert failures() == counted + 1
    assert "expected room in the audit log" in (ring.problem or "")
    ring.record = said.append
    assert ask(ring, new).name == "new"
    assert ask(ring, changed).scopes == {"admin"}
    with pytest.raises(UnauthenticatedError):
        ask(ring, gone)
    assert ring.problem is None
    assert len(set(said)) == 1
    assert said[0].startswith(f"3 keys: changed ({changed.id})")


@pytest.mark.usefixtures("impatient")
def test_what_was_verified_is_forgotten_when_the_file_changes(
    write_keys: WriteKeys, key: KeyText, hashed: list[tuple[str, int]]
) -> None:
    ring = KeyRing(write_keys(make_entry(key)))
    ask(ring, key)
    write_keys(make_entry(key))
    hashed.clear()
    ask(ring, key)
    assert len(hashed) == 1


@pytest.mark.usefixtures("impatient")
def test_a_secret_that_was_replaced_under_its_id_opens_nothing(write_keys: WriteKeys, key: KeyText) -> None:
    ring = KeyRing(write_keys(make_entry(key)))
    ask(ring, key)
    write_keys(make_entry(KeyText(key.id, "s" * 43)))
    with pytest.raises(UnauthenticatedError):
        ask(ring, key)


@pytest.mark.usefixtures("impatient")
def test_a_key_revoked_while_it_is_hashed_is_refused(
    write_keys: WriteKeys, key: KeyText, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, gate = threading.Event(), threading.Event()

    def slow(self: KeyEntry, secret: str) -> bool:
        started.set()
        return gate.wait(30)

    monkeypatch.setattr(KeyEntry, "opens_with", slow)
    ring = KeyRing(write_keys(make_entry(key)))

    async def go() -> None:
        asking = asyncio.create_task(ring.authenticate(str(key)))
        await asyncio.to_thread(started.wait, 30)
        write_keys()
        assert ring.names == ()
        gate.set()
        with pytest.raises(UnauthenticatedError):
            await asking

    asyncio.run(go())


BAD = [b"", b"version: 1\nkeys: [", b"version: 2", b"\xff", b"version: 1\nkeys: [{}]"]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("content", BAD)
def test_a_bad_file_keeps_the_last_good_one_says_so_and_counts_once(
    write_keys: WriteKeys, key: KeyText, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_keys(make_entry(key))
    ring = KeyRing(path)
    assert ring.problem is None
    before = failures()
    path.write_bytes(content)
    with caplog.at_level(logging.ERROR):
        assert [ask(ring, key).name for _ in range(3)] == ["team"] * 3
    assert failures() == before + 1
    assert len(caplog.records) == 1
    assert ring.problem is not None
    assert "keys.yaml" in ring.problem
    path.with_name("next.yaml").write_bytes(b"version: 1\nkeys: []")
    os.replace(path.with_name("next.yaml"), path)
    assert ring.problem is None
    assert ring.names == ()


@pytest.mark.usefixtures("impatient")
def test_a_file_that_vanishes_keeps_the_last_good_one_until_it_is_back(
    write_keys: WriteKeys, key: KeyText, tmp_path: Path
) -> None:
    path = write_keys(make_entry(key))
    ring = KeyRing(path)
    path.rename(tmp_path / "away")
    assert ask(ring, key).name == "team"
    assert "No such file" in str(ring.problem)
    (tmp_path / "away").rename(path)
    assert ring.problem is None
    assert ask(ring, key).name == "team"


@pytest.mark.usefixtures("impatient")
def test_a_file_that_everyone_may_write_is_used_again_after_chmod(
    write_keys: WriteKeys, key: KeyText
) -> None:
    path = write_keys(make_entry(key))
    ring = KeyRing(path)
    path.chmod(0o666)
    assert "chmod 600" in str(ring.problem)
    assert ask(ring, key).name == "team"
    path.chmod(0o600)
    assert ring.problem is None


def test_a_file_that_cannot_be_read_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        KeyRing(tmp_path / "keys.yaml")


def test_the_file_is_looked_at_twice_a_second_at_most(
    write_keys: WriteKeys, key: KeyText, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(keyring, "time", SimpleNamespace(monotonic=lambda: clock.now))
    ring = KeyRing(write_keys(make_entry(key)))
    write_keys()
    clock.now += 0.49
    assert ring.names == ("team",)
    clock.now += 0.02
    assert ring.names == ()


@pytest.mark.usefixtures("impatient")
def test_an_unchanged_file_is_not_read_again(
    write_keys: WriteKeys, key: KeyText, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = KeyRing(write_keys(make_entry(key)))

    def unexpected(*_: Any) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(keyring, "read_key_file", unexpected)
    assert ask(ring, key).name == "team"
    assert ring.problem is None


def test_neither_a_key_nor_its_hash_is_logged(
    write_keys: WriteKeys, key: KeyText, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "CHECK_EVERY", 0.0)
    entry = make_entry(key)
    with caplog.at_level(logging.DEBUG):
        ring = KeyRing(write_keys())
        write_keys(entry)
        ask(ring, key)
    assert "Read 1 keys" in caplog.text
    assert key.secret not in caplog.text
    assert entry.hash not in caplog.text


def test_a_ring_serves_one_event_loop_after_another(write_keys: WriteKeys, key: KeyText) -> None:
    other = new_key_text()
    ring = KeyRing(write_keys(make_entry(key), make_entry(other, "other")))
    assert [ask(ring, key).name, ask(ring, other).name] == ["team", "other"]
