from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from steerserve.errors import (
    MissingError,
    PolicyError,
    ReadOnlyError,
    RequestError,
    StaleError,
    UnavailableError,
)
from steerserve.policy import Policy, PolicyChange, PolicyFolder

from .documents import accept, document

NAME = "no-scam"
FILE = "no-scam.yaml"


def versions(folder: PolicyFolder) -> dict[str, int]:
    return {name: policy.version for name, policy in folder.current().policies.items()}


def etag(folder: PolicyFolder) -> str:
    return folder.current().policies[NAME].etag


def failures() -> float:
    return REGISTRY.get_sample_value("steerserve_policy_reload_failures_total") or 0.0


def never_two(policies: Sequence[Policy]) -> None:
    if len(policies) > 1:
        raise PolicyError(f"expected one policy, got {[policy.name for policy in policies]}")


# Reading


def test_the_first_load_refuses_what_cannot_be_enforced(home: Path) -> None:
    (home / "second.yaml").write_bytes(document("second", version=0))
    with pytest.raises(PolicyError, match=r"^second.yaml: expected `version` >= 1"):
        PolicyFolder(home, accept)
    (home / "second.yaml").write_bytes(document("second"))
    with pytest.raises(PolicyError, match="expected one policy"):
        PolicyFolder(home, never_two)


@pytest.mark.parametrize("path", ["nowhere", "policies/no-scam.yaml"])
def test_the_first_load_wants_a_folder(home: Path, path: str) -> None:
    with pytest.raises(PolicyError, match="expected policies that can be read"):
        PolicyFolder(home.parent / path, accept)


def test_hidden_and_other_files_are_no_policies(home: Path) -> None:
    (home / "README.md").write_text("about")
    (home / ".old.yaml").write_text("{")
    (home / "two.yml").write_bytes(document("two"))
    assert versions(PolicyFolder(home, accept)) == {NAME: 1, "two": 1}


def test_an_empty_folder_is_no_policy(tmp_path: Path) -> None:
    assert versions(PolicyFolder(tmp_path, accept)) == {}


def test_two_files_for_one_policy_are_refused(home: Path) -> None:
    shutil.copy(home / FILE, home / "no-scam.yml")
    with pytest.raises(
        PolicyError, match=r"no-scam.yml: expected one file for each policy, got no-scam.yaml"
    ):
        PolicyFolder(home, accept)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _huge(path: Path) -> None:
    path.write_bytes(b"#" * 300_000)


@pytest.mark.parametrize("make", [Path.mkdir, _pipe, _dangling, _huge])
def test_what_is_no_readable_file_is_refused_by_name(home: Path, make: Any) -> None:
    make(home / "odd.yaml")
    with pytest.raises(PolicyError, match=r"odd\.yaml|can be read"):
        PolicyFolder(home, accept)


def test_a_changed_file_is_in_force_at_the_next_look(home: Path, folder: PolicyFolder) -> None:
    before = folder.current()
    assert folder.current() is before
    (home / FILE).write_bytes(document(version=2))
    assert versions(folder) == {NAME: 2}
    assert before.policies[NAME].version == 1


def test_a_change_of_the_same_size_within_a_clock_tick_is_seen(home: Path, folder: PolicyFolder) -> None:
    folder.current()
    times = os.stat(home / FILE)
    with open(home / FILE, "r+b") as stream:
        stream.write(document(version=9))
    os.utime(home / FILE, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert versions(folder) == {NAME: 9}


def test_a_settled_folder_is_not_read_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, folder: PolicyFolder
) -> None:
    os.utime(home / FILE, (1, 1))
    folder.current()
    monkeypatch.setattr("steerserve.policy.folder.read_steady", lambda path: pytest.fail("was read again"))
    assert versions(folder) == {NAME: 1}
    assert folder.problem is None


def test_the_folder_is_looked_at_no_more_often_than_asked(home: Path) -> None:
    folder = PolicyFolder(home, accept, every=3600)
    (home / FILE).write_bytes(document(version=2))
    assert versions(folder) == {NAME: 1}


def test_one_bad_document_keeps_the_whole_last_set(
    home: Path, folder: PolicyFolder, caplog: pytest.LogCaptureFixture
) -> None:
    before, counted = folder.current(), failures()
    (home / FILE).write_bytes(document(version=2))
    (home / "bad.yaml").write_text("name: [")
    for _ in range(3):
        assert folder.current() is before
    assert str(folder.problem).startswith("bad.yaml: expected YAML")
    assert failures() == counted + 1
    assert len([line for line in caplog.records if line.levelno == logging.ERROR]) == 1
    (home / "bad.yaml").write_text("name: {")
    assert folder.current() is before
    assert failures() == counted + 2
    (home / "bad.yaml").unlink()
    assert versions(folder) == {NAME: 2}
    assert folder.problem is None


def test_a_set_that_the_check_refuses_keeps_the_last_one(home: Path) -> None:
    folder = PolicyFolder(home, never_two, every=0)
    (home / "second.yaml").write_bytes(document("second"))
    assert versions(folder) == {NAME: 1}
    assert str(folder.problem).startswith("expected one policy")


def test_a_check_that_breaks_keeps_the_last_set(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    def check(policies: Sequence[Policy]) -> None:
        if len(policies) > 1:
            raise KeyError("oops")

    folder = PolicyFolder(home, check, every=0)
    (home / "second.yaml").write_bytes(document("second"))
    assert versions(folder) == {NAME: 1}
    assert folder.problem == "KeyError('oops')"
    assert caplog.records[-1].exc_info


def test_a_folder_that_vanished_keeps_the_last_set(home: Path, folder: PolicyFolder) -> None:
    os.utime(home / FILE, (1, 1))
    before = folder.current()
    home.rename(home.with_name("away"))
    assert folder.current() is before
    assert "No such file" in str(folder.problem)
    home.with_name("away").rename(home)
    assert folder.current() is before
    assert folder.problem is None


def test_a_config_map_is_swapped_as_a_whole(tmp_path: Path) -> None:
    mount = tmp_path / "mount"

    def publish(stamp: str, *files: bytes) -> None:
        (mount / stamp).mkdir(parents=True)
        for name, content in zip("ab", files, strict=True):
            (mount / stamp / f"{name}.yaml").write_bytes(content)
            os.utime(mount / stamp / f"{name}.yaml", (1, 1))
        (mount / "..data_tmp").symlink_to(stamp)
        (mount / "..data_tmp").replace(mount / "..data")

    publish("..1", document("a"), document("b"))
    for name in "ab":
        (mount / f"{name}.yaml").symlink_to(f"..data/{name}.yaml")
    folder = PolicyFolder(mount, accept, every=0)
    assert versions(folder) == {"a": 1, "b": 1}
    publish("..2", document("a", version=2), document("b", version=2))
    assert versions(folder) == {"a": 2, "b": 2}
    publish("..3", document("a", version=3), b"{")
    assert versions(folder) == {"a": 2, "b": 2}
    with pytest.raises(UnavailableError, match=r"b\.yaml: expected YAML"):
        folder.put("a", document("a", version=9), if_match="*")
    publish("..4", document("a", version=4), document("b", version=4))
    with pytest.raises(ReadOnlyError, match="is a link"):
        folder.put("a", document("a", version=9), if_match="*")
    with pytest.raises(ReadOnlyError, match="is a link"):
        folder.delete("a", if_match="*")
    assert versions(folder) == {"a": 4, "b": 4}


def test_files_from_before_and_after_a_change_are_never_mixed(
    home: Path, monkeypatch: pytest.MonkeyPatch, folder: PolicyFolder
) -> None:
    from steerserve.policy import files

    (home / "second.yaml").write_bytes(document("second"))
    assert versions(folder) == {NAME: 1, "second": 1}
    read = files.read_file
    changed: list[Path] = []

    def read_then_change(path: Path) -> bytes:
        content = read(path)
        if not changed:
            changed.append(path)
            for name in (NAME, "second"):
                (home / f".{name}").write_bytes(document(name, version=22))
                (home / f".{name}").replace(home / f"{name}.yaml")
        return content

    (home / FILE).write_bytes(document(version=2))
    monkeypatch.setattr(files, "read_file", read_then_change)
    assert versions(folder) == {NAME: 22, "second": 22}


def test_a_folder_that_never_holds_still_is_a_problem(
    home: Path, monkeypatch: pytest.MonkeyPatch, folder: PolicyFolder
) -> None:
    from steerserve.policy import files

    read = files.read_file

    def read_and_touch(path: Path) -> bytes:
        with open(path, "ab") as stream:
            stream.write(b"#\n")
        return read(path)

    monkeypatch.setattr(files, "read_file", read_and_touch)
    before = folder.current()
    assert folder.current() is before
    assert "written to all the time" in str(folder.problem)


def test_others_go_on_with_the_last_set_while_one_reads(home: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def check(policies: Sequence[Policy]) -> None:
        if policies[0].version == 2:
            entered.set()
            assert leave.wait(60)

    folder = PolicyFolder(home, check, every=0)
    (home / FILE).write_bytes(document(version=2))
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(versions, folder)
        assert entered.wait(60)
        assert versions(folder) == {NAME: 1}
        leave.set()
        assert reader.result() == {NAME: 2}


def test_policies_are_counted_by_mode(home: Path) -> None:
    (home / "b.yaml").write_bytes(document("b", mode="shadow"))
    (home / "c.yaml").write_bytes(document("c", mode="shadow"))
    PolicyFolder(home, accept)
    modes = {
        mode: REGISTRY.get_sample_value("steerserve_policies", {"mode": mode})
        for mode in ("enforce", "shadow", "off")
    }
    assert modes == {"enforce": 1, "shadow": 2, "off": 0}


# Changing


def test_a_policy_is_created_replaced_and_deleted_and_in_force_at_once(home: Path) -> None:
    folder = PolicyFolder(home, accept, every=3600)
    created = folder.put("new", document("new"), if_none_match="*")
    new = folder.current().policies["new"]
    assert created == PolicyChange("new", "created", None, 1, "enforce", new.sha256, folder.current().version)
    assert (home / "new.yaml").read_bytes() == document("new")
    replaced = folder.put(NAME, document(version=5), if_match=etag(folder))
    assert (replaced.action, replaced.old_version, replaced.new_version) == ("replaced", 1, 5)
    assert versions(folder) == {"new": 1, NAME: 5}
    old = folder.current().policies["new"]
    deleted = folder.delete("new", if_match=old.etag)
    assert deleted == PolicyChange("new", "deleted", 1, None, None, old.sha256, folder.current().version)
    assert versions(folder) == {NAME: 5}
    assert not (home / "new.yaml").exists()
    assert versions(PolicyFolder(home, accept)) == {NAME: 5}


def test_a_policy_is_replaced_in_the_file_that_it_has(home: Path) -> None:
    (home / FILE).rename(home / "no-scam.yml")
    PolicyFolder(home, accept).put(NAME, document(version=2), if_match="*")
    assert [path.name for path in home.glob("*.y*ml")] == ["no-scam.yml"]


@pytest.mark.parametrize("if_match", [None, '"other"', "", "no-scam"])
def test_replacing_and_deleting_want_the_etag_of_what_is_there(
    folder: PolicyFolder, home: Path, if_match: str | None
) -> None:
    with pytest.raises(StaleError, match=f"`If-Match`.*{etag(folder)}"):
        folder.put(NAME, document(version=2), if_match=if_match)
    with pytest.raises(StaleError, match=f"`If-Match`.*{etag(folder)}"):
        folder.delete(NAME, if_match=if_match)
    assert (home / FILE).read_bytes() == document()


def test_a_weak_etag_does_not_match(folder: PolicyFolder) -> None:
    with pytest.raises(StaleError):
        folder.put(NAME, document(version=2), if_match=f"W/{etag(folder)}")


def test_one_of_several_etags_is_enough(folder: PolicyFolder) -> None:
    folder.put(NAME, document(version=2), if_match=f'"x", {etag(folder)}')
    assert versions(folder) == {NAME: 2}


def test_creating_never_replaces_and_replacing_never_creates(folder: PolicyFolder) -> None:
    with pytest.raises(StaleError, match="expected to find no such policy"):
        folder.put(NAME, document(version=2), if_none_match="*")
    with pytest.raises(StaleError, match="which is nothing"):
        folder.put("new", document("new"), if_match="*")
    with pytest.raises(MissingError, match="expected the name of a policy, got 'new'"):
        folder.delete("new", if_match="*")
    assert versions(folder) == {NAME: 1}


@pytest.mark.parametrize("version", [3, 2, 1])
def test_a_version_that_is_not_greater_is_refused(folder: PolicyFolder, version: int) -> None:
    folder.put(NAME, document(version=3), if_match="*")
    with pytest.raises(RequestError, match=rf"expected `version` > 3, .* got {version} - at \$.version"):
        folder.put(NAME, document(version=version), if_match="*")
    assert versions(folder) == {NAME: 3}


@pytest.mark.parametrize("name", ["../evil", "/evil", "", ".hidden", "a/b", "Bad", "a" * 65])
def test_a_name_leads_nowhere_outside_the_folder(folder: PolicyFolder, home: Path, name: str) -> None:
    with pytest.raises(RequestError, match=r"at \$.name"):
        folder.put(name, document(name))
    with pytest.raises(MissingError):
        folder.delete(name, if_match="*")
    assert sorted(path.name for path in home.parent.rglob("*.y*ml")) == [FILE]


def test_what_cannot_be_enforced_with_the_others_is_not_written(home: Path) -> None:
    folder = PolicyFolder(home, never_two, every=0)
    with pytest.raises(
        RequestError, match=r"enforced together: expected one policy, got \['no-scam', 'second'\]"
    ):
        folder.put("second", document("second"))
    with pytest.raises(RequestError, match=r"at \$.mode"):
        folder.put(NAME, document(version=2, mode="maybe"), if_match="*")
    assert sorted(path.name for path in home.glob("*.y*ml")) == [FILE]
    assert versions(folder) == {NAME: 1}


def test_what_the_rest_depends_on_is_not_deleted(home: Path) -> None:
    def check(policies: Sequence[Policy]) -> None:
        if not policies:
            raise PolicyError("expected at least one policy, got none")

    folder = PolicyFolder(home, check, every=0)
    with pytest.raises(RequestError, match="at least one policy"):
        folder.delete(NAME, if_match="*")
    assert (home / FILE).exists()


def test_a_damaged_document_is_mended_over_the_network(home: Path, folder: PolicyFolder) -> None:
    (home / FILE).write_text("{")
    assert versions(folder) == {NAME: 1}
    with pytest.raises(UnavailableError, match=r"mend or delete this one first: no-scam.yaml"):
        folder.put("new", document("new"))
    with pytest.raises(RequestError, match="expected `version` > 1"):
        folder.put(NAME, document(), if_match="*")
    folder.put(NAME, document(version=2), if_match="*")
    assert versions(folder) == {NAME: 2}
    assert folder.problem is None


def test_a_damaged_document_that_never_was_in_force_is_deleted_over_the_network(
    home: Path, folder: PolicyFolder
) -> None:
    (home / "bad.yaml").write_text("{")
    assert versions(folder) == {NAME: 1}
    assert folder.problem is not None
    assert folder.delete("bad", if_match="*").old_version is None
    assert folder.problem is None


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("call", ["open", "replace"])
def test_a_folder_that_cannot_be_written_says_so(
    home: Path, folder: PolicyFolder, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    deny(monkeypatch, call, number)
    with pytest.raises(ReadOnlyError, match="change its files where they come from"):
        folder.put(NAME, document(version=2), if_match="*")
    monkeypatch.undo()
    assert versions(folder) == {NAME: 1}
    assert [path.name for path in home.iterdir() if path.name != ".lock"] == [FILE]


def test_a_full_disk_leaves_the_old_document(
    home: Path, folder: PolicyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    deny(monkeypatch, "fsync", errno.ENOSPC)
    with pytest.raises(UnavailableError, match="No space left"):
        folder.put(NAME, document(version=2), if_match="*")
    monkeypatch.undo()
    assert versions(folder) == {NAME: 1}
    assert [path.name for path in home.iterdir() if path.name != ".lock"] == [FILE]


def test_a_policy_that_cannot_be_deleted_stays_in_force(
    folder: PolicyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    deny(monkeypatch, "unlink", errno.EROFS)
    with pytest.raises(ReadOnlyError):
        folder.delete(NAME, if_match="*")
    assert versions(folder) == {NAME: 1}


def deny(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """Let `os.CALL` fail wherever it would write."""
    real = getattr(os, call)

    def fail(*args: Any, **options: Any) -> Any:
        if call == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
            return real(*args, **options)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)


def _die(*_: object) -> None:
    os._exit(9)


def _put_and_die(home: Path) -> None:
    folder = PolicyFolder(home, accept)
    setattr(os, "replace", _die)  # noqa: B010
    folder.put(NAME, document(version=2), if_match="*")


def test_a_crash_before_the_replacement_leaves_the_old_document_and_no_lock(home: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_put_and_die, args=(home,))
    child.start()
    child.join()
    assert child.exitcode == 9
    assert (home / ".no-scam.yaml.tmp").read_bytes() == document(version=2)
    folder = PolicyFolder(home, accept)
    assert versions(folder) == {NAME: 1}
    folder.put(NAME, document(version=2), if_match="*")
    assert [path.name for path in home.iterdir() if path.name != ".lock"] == [FILE]


def test_a_change_holds_the_lock_from_reading_to_writing(
    home: Path, folder: PolicyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steerserve.policy import folder as module

    held = []

    def watched(name: str) -> None:
        real = getattr(module, name)

        def probe(*args: Any) -> Any:
            with open(home / ".lock") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    held.append(name)
            return real(*args)

        monkeypatch.setattr(module, name, probe)

    for name in ("read_folder", "write_file", "remove_file"):
        watched(name)
    folder.put(NAME, document(version=2), if_match="*")
    folder.delete(NAME, if_match="*")
    assert held == ["read_folder", "write_file", "read_folder", "remove_file"]


def _try_to_put(home: Path, version: int, tag: str) -> bool:
    try:
        PolicyFolder(home, accept).put(NAME, document(version=version), if_match=tag)
    except StaleError:
        return False
    return True


def test_of_concurrent_changes_with_one_etag_exactly_one_wins(home: Path, folder: PolicyFolder) -> None:
    tag = etag(folder)
    with ThreadPoolExecutor(8) as pool:
        won = [
            version
            for version, ok in zip(
                range(2, 26), pool.map(lambda v: _try_to_put(home, v, tag), range(2, 26)), strict=True
            )
            if ok
        ]
    assert [versions(folder)[NAME]] == won


def test_of_concurrent_processes_exactly_one_wins(home: Path, folder: PolicyFolder) -> None:
    tag = etag(folder)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.starmap(_try_to_put, [(home, version, tag) for version in range(2, 14)], chunksize=1)
    assert sum(results) == 1
    assert versions(folder) == {NAME: 2 + results.index(True)}


def test_a_look_that_began_before_a_change_does_not_undo_it(home: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def check(policies: Sequence[Policy]) -> None:
        if policies[0].version == 2:
            entered.set()
            assert leave.wait(60)

    folder = PolicyFolder(home, check, every=3600)
    folder._next_look = 0
    (home / FILE).write_bytes(document(version=2))
    with ThreadPoolExecutor(2) as pool:
        look = pool.submit(folder.current)
        assert entered.wait(60)
        change = pool.submit(folder.put, NAME, document(version=3), if_match="*")
        # Long enough for a change that would not wait for the look.
        wait([change], timeout=0.5)
        leave.set()
        look.result()
        change.result()
    assert versions(folder) == {NAME: 3}
