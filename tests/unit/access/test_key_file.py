import os
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from steerserve.access.key_entry import KeyEntry
from steerserve.access.key_file import KeyFile, Keys, Stamp, change_key_file, parse_key_file, read_key_file
from steerserve.access.key_text import KeyText, new_key_text
from steerserve.errors import KeyFileError

from .conftest import WriteKeys, make_entry

PATH = Path("keys.yaml")


def yaml_of(*entries: dict[str, Any], **more: Any) -> bytes:
    return yaml.safe_dump({"version": 1, "keys": list(entries), **more}).encode()


def fields_of(key: KeyText, **fields: Any) -> dict[str, Any]:
    return make_entry(key).model_dump(mode="json", exclude_none=True) | fields


def test_what_is_written_is_read_again(write_keys: WriteKeys, key: KeyText) -> None:
    entry = make_entry(
        key, limits={"features": {"demo": [[0, 100]]}, "max_value": 1e5}, expires="2030-01-01T00:00Z"
    )
    path = write_keys(entry)
    assert read_key_file(path)[0] == KeyFile(keys=(entry,))
    assert read_key_file(path)[1] == Stamp.of(path.stat())


@pytest.mark.parametrize(
    "id_", ["483043204e89", "123456789012", "000000000000", "0e0000000000", "abcdefabcdef"]
)
def test_an_id_that_looks_like_a_number_is_read_again(write_keys: WriteKeys, id_: str) -> None:
    entry = make_entry(KeyText(id_, "s" * 43), name="1e5")
    assert read_key_file(write_keys(entry))[0].keys == (entry,)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_value": st.floats(0, allow_nan=False, allow_infinity=False),
            "max_interventions": st.integers(0),
            "saes": st.lists(st.from_regex(r"\A(direction:)?[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z")),
        },
    ),
    st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z"),
    st.from_regex(r"\A[0-9a-f]{64}\Z"),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_entry_is_read_again(
    write_keys: WriteKeys, limits: dict[str, Any], name: str, digest: str
) -> None:
    entry = make_entry(KeyText("0123456789ab", "s" * 43), name, limits=limits, hash=digest)
    assert read_key_file(write_keys(entry))[0].keys == (entry,)


def test_a_written_file_is_for_its_owner_alone(tmp_path: Path, key: KeyText) -> None:
    path = tmp_path / "keys.yaml"
    path.write_bytes(yaml_of())
    path.chmod(0o644)
    change_key_file(path, lambda keys: (*keys, make_entry(key)))
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_write_that_fails_leaves_the_file_and_nothing_else(
    write_keys: WriteKeys, key: KeyText, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_keys()
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyFileError, match=r"No space left on device - in .*keys.yaml"):
        change_key_file(path, lambda keys: (*keys, make_entry(key)))
    assert path.read_bytes() == before
    assert {file.name for file in path.parent.iterdir()} == {"keys.yaml", ".keys.yaml.lock"}


def test_a_link_to_the_file_stays_a_link(write_keys: WriteKeys, key: KeyText) -> None:
    path = write_keys()
    link = path.with_name("link.yaml")
    link.symlink_to(path)
    change_key_file(link, lambda keys: (*keys, make_entry(key)))
    assert link.is_symlink()
    assert len(read_key_file(path)[0].keys) == 1


def test_changes_at_the_same_time_lose_nothing(write_keys: WriteKeys) -> None:
    path = write_keys()
    entries = [make_entry(new_key_text(), f"team-{number}") for number in range(12)]

    def add(entry: KeyEntry) -> None:
        change_key_file(path, lambda keys: (*keys, entry))

    threads = [threading.Thread(target=add, args=(entry,)) for entry in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_key_file(path)[0].keys} == {entry.name for entry in entries}


def test_a_change_that_is_refused_writes_nothing(write_keys: WriteKeys, key: KeyText) -> None:
    path = write_keys(make_entry(key))
    before = path.read_bytes()
    with pytest.raises(KeyFileError, match="expected each `id` once"):
        change_key_file(path, lambda keys: (*keys, make_entry(key, "other")))
    assert path.read_bytes() == before


def test_a_missing_file_is_made_only_where_that_is_asked_for(tmp_path: Path, key: KeyText) -> None:
    def add(keys: Keys) -> Keys:
        return (*keys, make_entry(key))

    with pytest.raises(KeyFileError, match="No such file"):
        change_key_file(tmp_path / "keys.yaml", add)
    with pytest.raises(KeyFileError, match="No such file"):
        change_key_file(tmp_path / "folder" / "keys.yaml", add, create=True)
    change_key_file(tmp_path / "keys.yaml", add, create=True)
    assert len(read_key_file(tmp_path / "keys.yaml")[0].keys) == 1


def test_a_file_that_everyone_may_write_is_refused(write_keys: WriteKeys) -> None:
    path = write_keys()
    path.chmod(0o602)
    with pytest.raises(KeyFileError, match="not everyone may write"):
        read_key_file(path)


def test_a_folder_is_no_file_of_keys(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"expected a file of keys: Is a directory"):
        read_key_file(tmp_path)


def test_a_file_beyond_all_bounds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_bytes(b"version: 1\n#" + b"x" * (1 << 22))
    with pytest.raises(KeyFileError, match="at most 4194304 bytes"):
        read_key_file(path)


KEY = KeyText("0123456789ab", "s" * 43)
OTHER = KeyText("0123456789ac", "s" * 43)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "version"),
        (b"[]", "version"),
        (b"keys: []", "version"),
        (b"version: 1\n", "`keys`"),
        (yaml_of(version=2), "at version"),
        (yaml_of(version=True), "at version"),
        (yaml_of(users=[]), "at users"),
        (b"version: 1\nkeys: {}", "at keys"),
        (b"version: 1\nkeys: [1]", r"at keys\[0\]"),
        (b"version: 1\nversion: 1\nkeys: []", "once"),
        (yaml_of(fields_of(KEY, limit={})), r"at keys\[0\].limit"),
        (yaml_of(fields_of(KEY, limits={"max": 1})), r"at keys\[0\].limits.max"),
        (yaml_of(fields_of(KEY, scopes=["root"])), r"at keys\[0\].scopes\[0\]"),
        (yaml_of(fields_of(KEY), fields_of(KEY, name="b")), "expected each `id` once, got `0123456789ab`"),
        (yaml_of(fields_of(KEY), fields_of(OTHER)), "expected each `name` once, got `team`"),
        (b"version: 1\nkeys: &a []\nb: *a", "anchors|alias"),
        (b"version: 1\nkeys: !!python/tuple []", "tag"),
        (b"\xff\xfe\x00", "UTF|YAML"),
        (b"version: 1\nkeys: [" + b"[" * 5000, "YAML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_place(content: bytes, said: str) -> None:
    with pytest.raises(KeyFileError, match=said) as caught:
        parse_key_file(content, PATH)
    assert str(caught.value).endswith("- in keys.yaml")


@pytest.mark.parametrize("field", ["id", "salt", "hash"])
def test_a_key_that_was_pasted_into_the_file_is_not_said_again(field: str) -> None:
    with pytest.raises(KeyFileError) as caught:
        parse_key_file(yaml_of(fields_of(KEY, **{field: str(KEY)})), PATH)
    assert "sss" not in str(caught.value)


def test_an_unquoted_expiry_is_read_as_well_as_a_quoted_one() -> None:
    content = yaml_of(fields_of(KEY, expires="2030-01-01T00:00:00Z"))
    assert b"'2030-01-01T00:00:00Z'" in content
    assert parse_key_file(content, PATH) == parse_key_file(
        content.replace(b"'2030-01-01T00:00:00Z'", b"2030-01-01T00:00:00Z"), PATH
    )


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"!!timestamp x")
@example(b"!!int ''")
@example(b"version: 1\nkeys: !!map [a]")
@example(b"? [a]\n: b")
@example(b"\0")
def test_any_bytes_are_a_file_of_keys_or_refused(content: bytes) -> None:
    try:
        parse_key_file(content, PATH)
    except KeyFileError:
        return


@given(
    st.dictionaries(st.sampled_from([*KeyEntry.model_fields, "more"]), _VALUES, max_size=4).map(
        lambda fields: yaml.safe_dump({"version": 1, "keys": [fields_of(KEY) | fields]}).encode()
    )
)
def test_any_fields_make_an_entry_or_are_refused(content: bytes) -> None:
    try:
        file = parse_key_file(content, PATH)
    except KeyFileError:
        return
    assert len(file.keys) == 1
