from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerserve.audit import AuditLog, Head, Record, Verdict, verify
from steerserve.audit.chain import canonical, link
from steerserve.audit.files import PRIVATE_KEY, PUBLIC_KEY
from steerserve.audit.heads import head_line
from steerserve.audit.lines import Torn, read_lines
from steerserve.audit.signing import make_key, public_path, read_signing_key
from steerserve.errors import AuditError, ConfigError
from tests.support.scale import scaled_examples

Copy = Callable[[], Path]


def line_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("audit-*.jsonl"))


def lines_of(folder: Path) -> list[tuple[Path, int]]:
    """The place of every line of the log: (file, index from 0)."""
    return [(path, i) for path in line_files(folder) for i in range(len(path.read_bytes().splitlines()))]


def place(verdict: Verdict) -> tuple[str, int | None]:
    assert verdict.fault is not None
    return verdict.fault.file.name, verdict.fault.line


def split(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def put(path: Path, start: int, stop: int, *lines: bytes) -> None:
    """Replace the lines from `start` to before `stop`."""
    old = split(path)
    path.write_bytes(b"".join([*old[:start], *lines, *old[stop:]]))


def each(written: Path, copied: Copy) -> Iterator[tuple[Path, int]]:
    """The same copy of the log for every line of it, put right again each time."""
    folder = copied()
    sound = {path.name: path.read_bytes() for path in line_files(folder)}
    for path, i in lines_of(written):
        yield folder / path.name, i
        for name, content in sound.items():
            (folder / name).write_bytes(content)


def test_the_log_under_test_is_sound_and_has_files_and_heads(written: Path) -> None:
    verdict = verify(written)
    assert verdict.ok
    assert verdict.key_id
    (chain,) = verdict.chains
    assert chain.lines == chain.head.seq == len(lines_of(written)) > 105
    assert chain.files == len(line_files(written)) >= 5
    assert (chain.unsigned, chain.torn) == (0, 0)
    assert sum(path.read_bytes().count(b'"event":"head"') for path in line_files(written)) >= 5


@pytest.mark.parametrize("where", [0, 0.3, 0.6, 1])
def test_an_edited_byte_is_found_in_its_line(written: Path, copied: Copy, where: float) -> None:
    for path, i in each(written, copied):
        old = split(path)[i]
        at = int(where * (len(old) - 1))
        new = old[:at] + bytes([old[at] ^ 1]) + old[at + 1 :]
        put(path, i, i + 1, new)
        assert place(verify(path.parent)) == (path.name, i + 1)


@pytest.mark.parametrize(
    "edit",
    [
        {"seq": 7777},
        {"seq": 1},
        {"prev": "5" * 64},
        {"time": "2020-01-01T00:00:00.000000Z"},
        {"principal": "somebody"},
        {"signature": "6" * 128},
    ],
)
def test_an_edited_field_is_found_in_its_line(written: Path, copied: Copy, edit: dict[str, object]) -> None:
    for path, i in each(written, copied):
        old = path.read_bytes().splitlines()[i]
        document = json.loads(old)
        new = canonical({**document, **{key: value for key, value in edit.items() if key in document}})
        if new == old:
            continue
        put(path, i, i + 1, new + b"\n")
        verdict = verify(path.parent)
        assert place(verdict) == (path.name, i + 1)
        assert verdict.fault is not None
        assert verdict.fault.kind in ("edited", "inserted", "bad signature")


def test_a_line_spelled_otherwise_is_found(written: Path, copied: Copy) -> None:
    for path, i in each(written, copied):
        put(path, i, i + 1, split(path)[i].replace(b",", b", ", 1))
        verdict = verify(path.parent)
        assert place(verdict) == (path.name, i + 1)
        assert "spelled otherwise" in str(verdict.fault)


def test_a_deleted_line_is_found(written: Path, copied: Copy) -> None:
    before: tuple[Path, int] | None = None
    for path, i in each(written, copied):
        put(path, i, i + 1)
        verdict = verify(path.parent)
        assert verdict.fault is not None
        if i == 0 and before is not None:
            # Of two neighbours in different files nobody can say which one lost a line.
            assert place(verdict) == (before[0].name, before[1] + 2)
        else:
            assert place(verdict) == (path.name, i + 1)
        assert verdict.fault.kind in ("deleted", "truncated")
        before = path, i


def test_neighbours_that_were_swapped_are_found(written: Path, copied: Copy) -> None:
    places = lines_of(written)
    for (first, i), (second, j) in pairwise(places):
        folder = copied()
        put(folder / first.name, i, i + 1, split(second)[j])
        put(folder / second.name, j, j + 1, split(first)[i])
        verdict = verify(folder)
        assert verdict.fault is not None
        assert (verdict.fault.kind, *place(verdict)) == ("reordered", first.name, i + 1)


def test_a_line_that_stands_twice_is_found(written: Path, copied: Copy) -> None:
    for path, i in each(written, copied):
        put(path, i, i, split(path)[i])
        verdict = verify(path.parent)
        assert verdict.fault is not None
        assert (verdict.fault.kind, *place(verdict)) == ("inserted", path.name, i + 2)


def test_a_line_that_was_put_in_is_found(written: Path, copied: Copy) -> None:
    last, at = lines_of(written)[-1]
    for path, i in each(written, copied):
        document = json.loads(path.read_bytes().splitlines()[i])
        forged = link(
            Record(event="request", principal="nobody").model_dump(),
            Head(document["seq"] - 1, document["prev"]),
        )
        put(path, i, i, forged + b"\n")
        verdict = verify(path.parent)
        assert verdict.fault is not None
        assert place(verdict) == (path.name, i + 1)
        # Of the last line it is the signed head that tells.
        is_last = (path.name, i) == (last.name, at)
        assert verdict.fault.kind == ("edited" if is_last else "inserted")


def test_a_file_cut_behind_a_line_is_found(written: Path, copied: Copy) -> None:
    for path, i in each(written, copied):
        if len(path.read_bytes().splitlines()) == i + 1:
            continue
        put(path, i + 1, len(split(path)))
        verdict = verify(path.parent)
        assert verdict.fault is not None
        assert (verdict.fault.kind, *place(verdict)) == ("truncated", path.name, i + 2)


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_file_cut_inside_a_line_is_found(written: Path, copied: Copy, cut: int) -> None:
    for path, i in each(written, copied):
        put(path, i, len(split(path)), split(path)[i][:-cut])
        verdict = verify(path.parent)
        assert verdict.fault is not None
        assert (verdict.fault.kind, *place(verdict)) == ("truncated", path.name, i + 1)


def test_a_log_cut_behind_a_line_with_all_later_files_is_found(written: Path, copied: Copy) -> None:
    last = line_files(written)[-1].name
    for path, i in each(written, copied):
        for later in line_files(path.parent):
            if later.name > path.name:
                later.unlink()
        put(path, i + 1, len(split(path)))
        verdict = verify(path.parent)
        if (path, i) == (path.parent / last, len(line_files(written)[-1].read_bytes().splitlines()) - 1):
            assert verdict.ok
        elif path.name == last:
            assert place(verdict) == (path.name, i + 2)
        else:
            assert (str(verdict.fault), *place(verdict))[1:] == (last, None)


def test_a_missing_file_is_found(written: Path, copied: Copy) -> None:
    for path in line_files(written):
        folder = copied()
        (folder / path.name).unlink()
        verdict = verify(folder)
        assert verdict.fault is not None
        assert (verdict.fault.kind, *place(verdict)) == ("file missing", path.name, None)


def test_files_that_changed_places_are_found(copied: Copy) -> None:
    folder = copied()
    first, second, third, *_ = line_files(folder)
    second.rename(folder / "aside")
    third.rename(second)
    (folder / "aside").rename(third)
    verdict = verify(folder)
    assert verdict.fault is not None
    assert verdict.fault.kind == "reordered"
    assert place(verdict) == (second.name, 1)
    assert first.exists()


def test_a_chain_under_another_name_is_found(copied: Copy) -> None:
    folder = copied()
    for path in [*line_files(folder), folder / "audit.head.json"]:
        path.rename(folder / path.name.replace("audit", "other"))
    assert not verify(folder).ok


@pytest.mark.parametrize("name", ["audit.head.json", PUBLIC_KEY])
def test_a_missing_head_or_public_key_is_found(copied: Copy, name: str) -> None:
    folder = copied()
    (folder / name).unlink()
    verdict = verify(folder)
    assert verdict.fault is not None
    assert (verdict.fault.kind, *place(verdict)) == ("file missing", name, None)


def test_every_edited_byte_of_the_signed_head_is_found(copied: Copy) -> None:
    path = copied() / "audit.head.json"
    old = path.read_bytes()
    for at in range(len(old)):
        path.write_bytes(old[:at] + bytes([old[at] ^ 1]) + old[at + 1 :])
        assert place(verify(path.parent)) == (path.name, 1)


def test_a_log_written_anew_by_someone_without_the_key_is_found_at_its_first_head(copied: Copy) -> None:
    folder = copied()
    stranger = make_key(folder.parent / "stranger.pem")
    head, first_head = Head(0, "0" * 64), None
    for path in line_files(folder):
        lines = []
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            document = json.loads(line)
            is_head = document["event"] == "head"
            lines.append(head_line(head, stranger) if is_head else link(document, head))
            head = head.then(lines[-1])
            first_head = first_head or ((path.name, number) if is_head else None)
        path.write_bytes(b"\n".join([*lines, b""]))
    verdict = verify(folder)
    assert verdict.fault is not None
    assert verdict.fault.kind == "bad signature"
    assert place(verdict) == first_head


def test_a_signing_key_that_was_swapped_is_found(copied: Copy, tmp_path: Path) -> None:
    folder = copied()
    shutil.copy(folder / PUBLIC_KEY, tmp_path / "kept.pem")
    for name in (PRIVATE_KEY, PUBLIC_KEY):
        (folder / name).unlink()
    make_key(folder / PRIVATE_KEY)
    verdict = verify(folder)
    assert verdict.fault is not None
    assert verdict.fault.kind == "bad signature"
    with pytest.raises(AuditError, match=r"bad signature: expected a signature of the key"):
        AuditLog(folder)
    assert verify(folder, tmp_path / "kept.pem").ok, "the log itself is what it was"


def test_a_log_of_another_key_throughout_is_found_with_the_key_that_was_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept.pem"
    make_key(kept)
    AuditLog(tmp_path / "log").close()
    assert verify(tmp_path / "log").ok
    verdict = verify(tmp_path / "log", public_path(kept))
    assert verdict.fault is not None
    assert verdict.fault.kind == "bad signature"


def test_a_log_cut_by_someone_with_the_key_is_found_by_a_head_from_outside(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, fsync="never", head_lines=3)
    for number in range(10):
        log.append(Record(event="request", tokens=number)).result()
    anchor = log.head
    old_head = (tmp_path / "audit.head.json").read_bytes()
    old_size = (tmp_path / "audit-000001.jsonl").stat().st_size
    for number in range(10):
        log.append(Record(event="request", tokens=number)).result()
    later = log.head
    log.close()
    assert verify(tmp_path, head=anchor).ok
    assert verify(tmp_path, head=later).ok
    (tmp_path / "audit.head.json").write_bytes(old_head)
    os.truncate(tmp_path / "audit-000001.jsonl", old_size)
    assert verify(tmp_path).ok, "what nothing inside the folder can tell"
    assert verify(tmp_path, head=anchor).ok
    verdict = verify(tmp_path, head=later)
    assert verdict.fault is not None
    assert verdict.fault.kind == "truncated"
    forged = verify(tmp_path, head=Head(anchor.seq, "1" * 64))
    assert forged.fault is not None
    assert (forged.fault.kind, forged.fault.line) == ("edited", anchor.seq)


def test_lines_behind_the_signed_head_and_a_half_line_are_what_a_crash_leaves(tmp_path: Path) -> None:
    AuditLog(tmp_path, fsync="never").close()
    old_head = (tmp_path / "audit.head.json").read_bytes()
    log = AuditLog(tmp_path, fsync="never")
    log.append(Record(event="request")).result()
    log.close()
    (tmp_path / "audit.head.json").write_bytes(old_head)
    with (tmp_path / "audit-000001.jsonl").open("ab") as stream:
        stream.write(b'{"detail":')
    (chain,) = verify(tmp_path).chains
    assert (chain.fault, chain.unsigned, chain.torn) == (None, 4, 10)


def test_each_chain_of_a_folder_is_checked(tmp_path: Path) -> None:
    for prefix in ("api-0", "api-1"):
        AuditLog(tmp_path, prefix).close()
    verdict = verify(tmp_path)
    assert verdict.ok
    assert [chain.prefix for chain in verdict.chains] == ["api-0", "api-1"]
    assert all(verify(tmp_path, head=chain.head).ok for chain in verdict.chains)
    (tmp_path / "api-1-000001.jsonl").write_bytes(b"")
    assert place(verify(tmp_path)) == ("api-1-000001.jsonl", 1)


def test_a_folder_that_is_none_or_empty_or_a_bad_key_is_told(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="nowhere"):
        verify(tmp_path / "nowhere")
    with pytest.raises(AuditError, match="expected an Ed25519 public key"):
        verify(tmp_path, tmp_path / "nowhere.pem")
    make_key(tmp_path / PRIVATE_KEY)
    assert verify(tmp_path).fault
    (tmp_path / PUBLIC_KEY).write_bytes(b"no key")
    assert place(verify(tmp_path)) == (PUBLIC_KEY, None)


@scaled_examples(300, 60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_lies_there_the_verdict_says_what_is_wrong(data: st.DataObject, copied: Copy) -> None:
    folder = copied()
    path = data.draw(st.sampled_from([*line_files(folder), folder / "audit.head.json"]))
    old = path.read_bytes()
    start = data.draw(st.integers(0, len(old)))
    stop = data.draw(st.integers(start, len(old)))
    new = old[:start] + data.draw(st.binary(max_size=40) | json_pieces) + old[stop:]
    if new == old:
        return
    path.write_bytes(new)
    verdict = verify(folder)
    if path == line_files(folder)[-1] and new.startswith(old):
        # What is added behind the signed head may be a crash's half line, or a line that follows.
        assert verdict.ok or place(verdict)[0] == path.name
    else:
        assert not verdict.ok
        assert str(verdict.fault).startswith(str(folder))


json_pieces = st.sampled_from(
    [b"{}\n", b"null\n", b"[" * 5000, b"\n", b"9" * 5000, b"NaN", b'"\\ud800"', b'{"event":"head"}\n', b"\0"]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=500), head=st.binary(max_size=500), key=st.none() | st.binary(max_size=200))
def test_arbitrary_bytes_never_pass(content: bytes, head: bytes, key: bytes | None, copied: Copy) -> None:
    folder = copied()
    (folder / "audit-000001.jsonl").write_bytes(content)
    (folder / "audit.head.json").write_bytes(head)
    if key is not None:
        (folder / PUBLIC_KEY).write_bytes(key)
    assert not verify(folder).ok


def test_a_line_without_end_is_not_read_whole(copied: Copy) -> None:
    path = copied() / "audit-000001.jsonl"
    path.write_bytes(b" " * (3 << 20))
    assert place(verify(path.parent)) == (path.name, 1)


@pytest.mark.parametrize("text", ["", "1", "1:ab", "x:" + "0" * 64, "-1:" + "0" * 64, "1:" + "G" * 64])
def test_a_head_that_is_none_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a head SEQ:HASH"):
        Head.parse(text)


@given(st.integers(0, 10**15), st.binary(min_size=32, max_size=32))
def test_a_head_comes_back_from_its_text(seq: int, digest: bytes) -> None:
    head = Head(seq, digest.hex())
    assert Head.parse(str(head)) == head


def test_a_key_comes_back_from_its_file_which_is_its_owners_alone(tmp_path: Path) -> None:
    key = make_key(tmp_path / "keys" / "audit.pem")
    path = tmp_path / "keys" / "audit.pem"
    assert read_signing_key(path).public.id == key.public.id
    assert path.stat().st_mode & 0o777 == 0o600
    assert key.public.accepts(key.sign(b"a"), b"a")
    assert not key.public.accepts(key.sign(b"a"), b"b")
    assert sorted(found.name for found in path.parent.iterdir()) == ["audit.pem", "audit.pub.pem"]
    with pytest.raises(AuditError, match="never overwritten"):
        make_key(path)
    path.unlink()
    with pytest.raises(AuditError, match=r"expected no file at .*audit\.pub\.pem"):
        make_key(path)


def test_no_name_from_a_line_reaches_the_terminal_as_it_is(copied: Copy) -> None:
    path = copied() / "audit-000001.jsonl"
    put(path, 3, 4, split(path)[3].replace(b'"model"', b'"\\u001b[31m"'))
    verdict = verify(path.parent)
    assert place(verdict) == (path.name, 4)
    assert "\x1b" not in str(verdict.fault)


def test_a_line_that_is_completed_while_it_is_read_stays_torn(tmp_path: Path) -> None:
    path = tmp_path / "audit-000001.jsonl"
    path.write_bytes(b'{"half')
    items = read_lines(path)
    assert isinstance(next(items), Torn)
    with path.open("ab") as stream:
        stream.write(b'":1}\n')
    assert list(items) == []
